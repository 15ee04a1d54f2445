"""SuperTux: starting it, levels that tell the truth, scripted demonstrators. The page is docs/supertux_env.md."""
