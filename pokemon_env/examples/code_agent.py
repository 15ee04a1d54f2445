"""A code agent as expert: an agent with `step(game_state) -> {"action": ...}` behind `get_action(obs, info)`.

    python collect_expert_data.py --episodes 1 --expert pokemon_env/examples/code_agent.py:make_expert

`StubAgent` stands where yours goes, so that this runs without a key or a network: put your agent into `make_expert`. An
agent that writes code and runs it runs that code here, with your rights.
"""

import numpy as np
from PIL import Image


class StubAgent:
    """Plays like an agent that was told nothing: A while somebody talks, else a short walk round in circles."""

    def __init__(self):
        self.walk = ["up", "up", "right", "right", "down", "down", "left", "left"]

    def step(self, game_state: dict) -> dict:
        """`game_state`: see `make_game_state`. An answer is one action or a list of them, by name."""
        if game_state["game"]["dialogue_detected"] or game_state["game"]["is_in_battle"]:
            return {"action": "a"}
        self.walk = self.walk[2:] + self.walk[:2]
        return {"action": self.walk[:2]}


def make_game_state(obs: np.ndarray, info: dict) -> dict:
    """What code agents expect, of the picture (160, 240, 3) uint8 and PokemonEnv's `info`: frame (a PIL image), player,
    game, map, visual."""
    frame = Image.fromarray(np.asarray(obs))
    player, battle = info["player"], info["battle"]
    party = [
        {
            "species_name": str(member["species"]),
            "nickname": member["nickname"],
            "level": member["level"],
            "current_hp": member["hp"],
            "max_hp": member["max_hp"],
            "status": member["status"],
        }
        for member in info["party"]
    ]
    return {
        "frame": frame,
        "player": {
            "name": player["name"],
            "position": {"x": player["x"], "y": player["y"]},
            "facing": player["facing"],
            "location": player["location"],
            "party": party,
        },
        "game": {
            "money": info["money"],
            "badges": info["badges"],
            "game_state": "battle" if battle else "dialog" if info["dialogue"] else "overworld",
            "is_in_battle": battle is not None,
            "battle_info": battle,
            "dialogue_detected": info["dialogue"],
            "progress_context": info["milestones"],
        },
        "map": {"id": player["map"], **info["map"]},
        "visual": {"screenshot": frame, "resolution": list(frame.size)},
    }


class CodeAgentExpert:
    """The adapter. What the agent answers is handed on: lists are queued by the collector, errors end the episode."""

    def __init__(self, agent):
        self.agent = agent

    def get_action(self, obs: np.ndarray, info: dict):
        return self.agent.step(make_game_state(obs, info))


def make_expert() -> CodeAgentExpert:
    """Called once in every process that plays."""
    return CodeAgentExpert(StubAgent())
