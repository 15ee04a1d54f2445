"""Releases keys on an X server when the program that pressed them is gone. `common.desktop.Watchdog` starts this file
as a process of its own, with a display, seconds of silence, and X keycodes.

Standard input is a pipe: any byte says that the program lives, `q` that it has released everything itself, the end that
it is gone. Only what this needs is imported, so that it is there in a tenth of a second.
"""

import os
import select
import sys
import time


def release(display, codes: list[int]):
    """Release those of `codes` that are down."""
    from Xlib import X
    from Xlib.ext import xtest

    bits = display.query_keymap()  # 32 bytes, one bit per keycode
    for code in codes:
        if bits[code // 8] >> code % 8 & 1:
            xtest.fake_input(display, X.KeyRelease, code)
    display.sync()


def main(name: str, silence_s: float, codes: list[int]):
    from Xlib.display import Display

    display = Display(name or None)
    print("ready", flush=True)
    said = b"."
    while said:
        told = select.select([0], [], [], silence_s)[0]
        said = os.read(0, 4096) if told else b"."
        if said.endswith(b"q"):
            return
        if not told:  # it hangs
            release(display, codes)
    for _ in range(10):  # what a killed program had sent may be read by the server after the first release
        release(display, codes)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), [int(code) for code in sys.argv[3:]])
