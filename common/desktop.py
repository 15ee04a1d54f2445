"""The desktop: grab pixels, press keys, hear keys. X11 only; its libraries are imported when an object is made.

Times are CLOCK_MONOTONIC nanoseconds. Keys carry evdev names (`KEY_RIGHT`); an X keycode is the evdev code plus 8.
"""

import queue
import threading
import time

import numpy as np

from common.sessions import KEY_CODES

NAMES = {code + 8: name for name, code in KEY_CODES.items()}  # X keycode -> evdev name
INSTALL = "Install the live extra: pip install -e '.[live]'"


class Screen:
    """The newest picture of a display. `grab()` returns uint8 (height, width, 3) RGB and the time it was taken."""

    def __init__(self, display: str, width: int, height: int, left: int = 0, top: int = 0):
        try:
            import mss
        except ImportError as error:
            raise ImportError(f"mss does not import ({error}). {INSTALL}") from None
        self.mss = mss.MSS(display=display)
        self.region = {"left": left, "top": top, "width": width, "height": height}

    def grab(self) -> tuple[np.ndarray, int]:
        shot = self.mss.grab(self.region)
        now = time.monotonic_ns()
        bgra = np.frombuffer(shot.bgra, np.uint8).reshape(shot.height, shot.width, 4)
        return np.ascontiguousarray(bgra[..., 2::-1]), now

    def close(self):
        self.mss.close()


class Keyboard:
    """Presses keys by XTEST. `sent` is the ledger: (monotonic ns, name, "down" | "up") of everything it sent."""

    def __init__(self, display: str):
        self.display, self.X = _connect(display)
        self.held: set[str] = set()
        self.sent: list[tuple[int, str, str]] = []

    def hold(self, names: set[str]):
        """Make exactly these keys held: press what is missing, release what is left over."""
        for name in sorted(self.held - names):
            self._send(name, "up")
        for name in sorted(names - self.held):
            self._send(name, "down")
        self.display.sync()

    def tap(self, name: str, seconds: float = 0.05):
        held = set(self.held)
        self.hold(held | {name})
        time.sleep(seconds)
        self.hold(held)

    def _send(self, name: str, state: str):
        from Xlib.ext import xtest

        if name not in KEY_CODES:
            raise ValueError(
                f"{name!r} is no key name known here, expected one like KEY_RIGHT (common.sessions.KEY_CODES)"
            )
        kind = self.X.KeyPress if state == "down" else self.X.KeyRelease
        self.sent.append((time.monotonic_ns(), name, state))
        xtest.fake_input(self.display, kind, KEY_CODES[name] + 8)
        self.held ^= {name}

    def close(self):
        """Release everything: a key held by a closed client stays held."""
        from Xlib.error import ConnectionClosedError

        try:
            self.hold(set())
            self.display.close()
        except (ConnectionClosedError, BrokenPipeError):  # the X server went first
            pass


class KeyListener:
    """Hears every key of a display through the RECORD extension, whichever window has the focus.

    `events` is a queue of (monotonic ns, name, "down" | "up" | "repeat"). The time is the server's own, which is
    CLOCK_MONOTONIC in ms: repeats can be delivered a second late but are stamped right. Close it before the X server.
    """

    def __init__(self, display: str):
        from Xlib.ext import record

        self.record = record
        self.control, self.X = _connect(display)
        self.data, _ = _connect(display)  # record_enable_context blocks its connection
        if not self.control.has_extension("RECORD"):
            raise ValueError(f"display {display} lacks the RECORD extension, keys cannot be heard. Use Xvfb or Xorg.")
        self.events: queue.Queue[tuple[int, str, str]] = queue.Queue()
        self.held: set[str] = set()
        nothing = (0, 0)
        ranges = dict.fromkeys(("core_requests", "core_replies", "delivered_events", "errors"), nothing)
        ranges |= {"ext_requests": (0, 0, 0, 0), "ext_replies": (0, 0, 0, 0), "client_started": False}
        ranges |= {"client_died": False, "device_events": (self.X.KeyPress, self.X.KeyRelease)}
        self.context = self.control.record_create_context(0, [record.AllClients], [ranges])
        self.control.sync()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="key-listener", daemon=True)
        self.thread.start()
        if not self.ready.wait(5):
            raise TimeoutError(f"display {display}: RECORD did not start within 5 s. Start the X server again.")

    def _listen(self):
        from Xlib.error import ConnectionClosedError

        try:
            self.data.record_enable_context(self.context, self._heard)
        except (ConnectionClosedError, OSError):  # the X server went first
            pass

    def _heard(self, reply):
        from Xlib.protocol import rq

        self.ready.set()  # the first reply only says that recording has started
        data = reply.data
        while reply.category == self.record.FromServer and len(data):
            event, data = rq.EventField(None).parse_binary_value(data, self.data.display, None, None)
            name = NAMES.get(event.detail, f"KEYCODE_{event.detail}")
            if event.type == self.X.KeyPress:
                state = "repeat" if name in self.held else "down"  # X repeats a held key as further presses
                self.held.add(name)
            else:
                state = "up"
                self.held.discard(name)
            now_ms = time.monotonic_ns() // 1_000_000
            age_ms = (now_ms - event.time + 2**31) % 2**32 - 2**31  # the server counts in 32 bits
            self.events.put(((now_ms - age_ms) * 1_000_000, name, state))

    def drain(self) -> list[tuple[int, str, str]]:
        """What was heard since the last call."""
        heard = []
        while not self.events.empty():
            heard.append(self.events.get())
        return heard

    def close(self):
        from Xlib.error import ConnectionClosedError

        try:
            self.control.record_disable_context(self.context)
            self.control.sync()  # also flushes repeats that the server kept back
            self.thread.join(2)
            self.control.record_free_context(self.context)
            self.control.close()
            self.data.close()
        except (ConnectionClosedError, BrokenPipeError):
            pass


def _connect(display: str):
    """A connection to an X server, and the constants of python-xlib."""
    try:
        from Xlib import X
        from Xlib.display import Display
        from Xlib.error import DisplayError
    except ImportError as error:
        raise ImportError(f"python-xlib does not import ({error}). {INSTALL}") from None
    try:
        return Display(display), X
    except (DisplayError, OSError) as error:
        raise ConnectionError(
            f"no X server answers at {display!r} ({error}). Start one, for example: Xvfb :9 -screen 0 640x480x24"
        ) from None
