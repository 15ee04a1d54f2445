"""Games of stable-retro as plain Gymnasium environments, and players of Airstriker that see only the screen."""
