"""GBA games as Gymnasium environments: `gym.make("pokemon_env:Quest-v0")`, `gym.make("pokemon_env:Emerald-v0")`.
The page is docs/pokemon_env.md."""

from pathlib import Path

import gymnasium

QUEST_ROM = Path(__file__).parent / "quest" / "quest.gba"
EMERALD_ROM = Path("Emerald-GBAdvance/rom.gba")  # the user's own

_ENTRY = "pokemon_env.gym_env:PokemonEnv"  # imported by gym.make only
if "Quest-v0" not in gymnasium.registry:
    gymnasium.register(
        id="Quest-v0",
        entry_point=_ENTRY,
        kwargs={"rom_path": str(QUEST_ROM), "randomize_release_frames": True, "max_steps": 1000},
    )
if "Emerald-v0" not in gymnasium.registry:
    gymnasium.register(id="Emerald-v0", entry_point=_ENTRY, kwargs={"rom_path": str(EMERALD_ROM)})
