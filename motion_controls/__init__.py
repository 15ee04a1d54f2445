"""Recordings of players who control a game with body and hands: reading them, and measuring a policy against them."""
