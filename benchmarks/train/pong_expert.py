r"""A player of Atari's Pong that looks at the picture only: it moves its paddle to the height of the ball.

python collect_expert_data.py --env-id ALE/Pong-v5 --expert benchmarks/train/pong_expert.py:make_expert \
    --expert-data-dir expert_data/pong
"""

import numpy as np

NOOP, UP, DOWN = 0, 2, 3
FIELD = slice(34, 194)  # rows between the walls
BALL, PADDLE = (236, 236, 236), (92, 186, 92)


class PongExpert:
    def get_action(self, obs: np.ndarray, info: dict) -> int:
        """`obs` (210, 160, 3) uint8."""
        field = obs[FIELD]
        ball = np.argwhere((field[:, 20:140] == BALL).all(2))  # (pixels, 2) row, column
        paddle = np.argwhere((field[:, 140:144] == PADDLE).all(2))
        if len(paddle) == 0:
            return NOOP
        target = ball[:, 0].mean() if len(ball) else len(field) / 2
        off = target - paddle[:, 0].mean()
        return NOOP if abs(off) < 4 else UP if off < 0 else DOWN


def make_expert() -> PongExpert:
    return PongExpert()
