"""The desktop: grab pixels, find windows, press keys, hear keys. Libraries are imported when an object is made.

Times are CLOCK_MONOTONIC nanoseconds. Keys carry evdev names (`KEY_RIGHT`); an X keycode is the evdev code plus 8.
Windows are found on X11 only. `PynputListener`, `EvdevListener`, `PynputKeyboard` and `UinputKeyboard` are untested.
"""

import contextlib
import importlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from common.sessions import KEY_CODES

NAMES = {code: name for name, code in KEY_CODES.items()}  # evdev code -> name
# pynput's names of keys where they are not evdev's, and what a key of a US keyboard writes, with and without shift
PYNPUT = "alt LEFTALT alt_l LEFTALT alt_r RIGHTALT alt_gr RIGHTALT ctrl LEFTCTRL ctrl_l LEFTCTRL ctrl_r RIGHTCTRL "
PYNPUT += "shift LEFTSHIFT shift_l LEFTSHIFT shift_r RIGHTSHIFT caps_lock CAPSLOCK num_lock NUMLOCK page_up PAGEUP "
PYNPUT += "page_down PAGEDOWN scroll_lock SCROLLLOCK print_screen SYSRQ - MINUS _ MINUS = EQUAL + EQUAL [ LEFTBRACE "
PYNPUT += "{ LEFTBRACE ] RIGHTBRACE } RIGHTBRACE ; SEMICOLON : SEMICOLON ' APOSTROPHE \" APOSTROPHE ` GRAVE ~ GRAVE "
PYNPUT += "\\ BACKSLASH | BACKSLASH , COMMA < COMMA . DOT > DOT / SLASH ? SLASH ! 1 @ 2 # 3 $ 4 % 5 ^ 6 & 7 * 8 ( 9 ) 0"


class Screen:
    """The newest picture of a part of a display. `region` is (left, top, width, height); None is the first monitor."""

    def __init__(self, display: str | None = None, region: tuple[int, int, int, int] | None = None):
        mss = _import("mss")
        if display is None and os.environ.get("XDG_SESSION_TYPE") == "wayland":
            raise ConnectionError(
                "this is a Wayland session, whose screen cannot be grabbed. Log in to an X11 session, or play in an X "
                "server with a window of its own: Xwayland :5 -geometry 1280x800, then record and play with "
                "XDG_SESSION_TYPE=x11 DISPLAY=:5"
            )
        try:
            self.mss = mss.MSS(display=display) if sys.platform == "linux" else mss.MSS()
            first = (self.mss.monitors[1:] or self.mss.monitors)[0]  # without RandR only the whole is known
        except mss.ScreenShotError as error:
            where = display or os.environ.get("DISPLAY", "")
            raise ConnectionError(f"the screen of DISPLAY={where!r} cannot be grabbed: {error}") from None
        self.region = region or (first["left"], first["top"], first["width"], first["height"])
        self.errors = (mss.ScreenShotError, AssertionError)  # the latter where the X server went first
        self.failure = ""

    def grab(self, out: np.ndarray | None = None) -> tuple[np.ndarray | None, int]:
        """uint8 (height, width, 3) RGB and the time it was taken; into `out` where given, which may be smaller. The
        picture is None, and `failure` tells why, where there is none, as of a region that leaves the screen."""
        try:
            shot = self.mss.grab(dict(zip(("left", "top", "width", "height"), self.region, strict=True)))
        except self.errors as error:
            self.failure = str(error).partition("\n")[0]
            return None, time.monotonic_ns()
        now = time.monotonic_ns()
        bgra = np.frombuffer(shot.raw, np.uint8).reshape(shot.height, shot.width, 4)
        out = np.empty((shot.height, shot.width, 3), np.uint8) if out is None else out
        for channel in range(3):  # four times as fast as a copy of the reversed axis
            out[..., channel] = bgra[: out.shape[0], : out.shape[1], 2 - channel]
        return out, now

    def close(self):
        with contextlib.suppress(*self.errors):
            self.mss.close()


class Window:
    """The window whose title holds `title`, whatever the case; of several the one with the shortest title, as that of a
    terminal or a browser tab only quotes it. Raises ValueError with the titles found if there is none."""

    def __init__(self, display: str | None, title: str):
        self.display, self.X = _connect(display)
        self.root, self.utf8 = self.display.screen().root, self.display.intern_atom("_NET_WM_NAME")
        listed = self.root.get_full_property(self.display.intern_atom("_NET_CLIENT_LIST"), self.X.AnyPropertyType)
        windows = [self.display.create_resource_object("window", number) for number in listed.value] if listed else []
        windows = windows or self._below(self.root)  # without a window manager
        titles = {self._title(window): window for window in windows if self._shown(window)}
        found = sorted((name for name in titles if title.lower() in name.lower()), key=len)
        if not found:
            names = ", ".join(repr(name) for name in titles if name) or "none"
            raise ValueError(f"no window has {title!r} in its title. The titles are: {names}")
        self.title, self.window = found[0], titles[found[0]]

    def _below(self, window) -> list:
        children = getattr(_ask(window.query_tree), "children", [])
        return [inner for child in children for inner in [child, *self._below(child)]]

    def _title(self, window) -> str:
        title = _ask(lambda: window.get_full_text_property(self.utf8)) or _ask(window.get_wm_name) or ""
        return title if isinstance(title, str) else title.decode("latin-1")  # compound text comes as it is

    def _shown(self, window) -> bool:
        return getattr(_ask(window.get_attributes), "map_state", None) == self.X.IsViewable

    def region(self) -> tuple[int, int, int, int] | None:
        """(left, top, width, height) on the screen now; None when the window is closed."""
        size, place = _ask(self.window.get_geometry), _ask(lambda: self.root.translate_coords(self.window, 0, 0))
        return (place.x, place.y, size.width, size.height) if size and place else None

    def shown(self) -> bool:
        """It is not minimised. Another window may still lie above it."""
        return self._shown(self.window)

    def focused(self) -> bool:
        """Keys go to this window or one inside it, or the server sends them to no window in particular."""
        focus = _ask(self.display.get_input_focus)
        window = focus.focus if focus else 0
        while not isinstance(window, int) and window not in (self.root, self.window):
            window = getattr(_ask(window.query_tree), "parent", 0)
        return isinstance(window, int) or window != self.root or focus.focus == self.root


class Sender:
    """Presses keys. `sent` is the ledger: (monotonic ns, name, "down" | "up") of everything it sent."""

    def __init__(self):
        self.held: set[str] = set()
        self.sent: list[tuple[int, str, str]] = []

    def hold(self, names: set[str]):
        """Make exactly these keys held: press what is missing, release what is left over. Returns when the keys have
        arrived. Raises ConnectionError where there is nothing left to send to."""
        changes = [(name, "up") for name in sorted(self.held - names)]
        changes += [(name, "down") for name in sorted(names - self.held)]
        for name, state in changes:
            self._note(name, state)
        if changes:
            self._flush()

    def tap(self, name: str, seconds: float = 0.05):
        held = set(self.held)
        self.hold(held | {name})
        time.sleep(seconds)
        self.hold(held)

    def _note(self, name: str, state: str):
        if name not in KEY_CODES:
            raise ValueError(
                f"{name!r} is no key name known here, expected one like KEY_RIGHT (common.sessions.KEY_CODES)"
            )
        self.sent.append((time.monotonic_ns(), name, state))
        self.held.add(name)  # before it goes down and until it has gone up, should this be interrupted
        self._send(name, state == "down")
        if state == "up":
            self.held.discard(name)

    def _flush(self):
        """Wait until what was sent has arrived, where one can know."""


class Keyboard(Sender):
    """X11, by XTEST."""

    def __init__(self, display: str | None):
        super().__init__()
        self.display, self.X = _connect(display)

    def hold(self, names: set[str]):
        from Xlib.error import ConnectionClosedError

        try:
            super().hold(names)
        except (ConnectionClosedError, OSError) as error:
            raise ConnectionError(f"keys cannot be sent, the X server has ended ({error})") from None

    def _send(self, name: str, down: bool):
        from Xlib.ext import xtest

        xtest.fake_input(self.display, self.X.KeyPress if down else self.X.KeyRelease, KEY_CODES[name] + 8)

    def _flush(self):
        self.display.sync()

    def down(self) -> set[str]:
        """The keys that the server holds for pressed, whoever pressed them."""
        return _names_down(self.display)

    def close(self):
        """Release everything: a key held by a closed client stays held."""
        _ask(lambda: self.hold(set()))
        _ask(self.display.close)


class PynputKeyboard(Sender):
    """Windows and macOS. Untested."""

    def __init__(self):
        super().__init__()
        keyboard = _import("pynput.keyboard")
        self.controller, words = keyboard.Controller(), PYNPUT.split()
        plain = {name: name.removeprefix("KEY_").lower() for name in KEY_CODES}  # letters, digits, what both call alike
        table = {f"KEY_{name}": word for word, name in zip(words[-2::-2], words[::-2], strict=True)}  # first ones win
        names = plain | {name: word for name, word in table.items() if len(plain[name]) > 1}
        self.names = {name: getattr(keyboard.Key, word, word) for name, word in names.items()}

    def _send(self, name: str, down: bool):
        key = self.names[name]
        if isinstance(key, str) and len(key) > 1:
            raise ValueError(f"pynput cannot press {name}. Train without it: iql_reflex.py --keys")
        (self.controller.press if down else self.controller.release)(key)

    def close(self):
        self.hold(set())


class UinputKeyboard(Sender):
    """A keyboard of the Linux kernel, for Wayland. Untested. The kernel releases its keys when the program ends."""

    def __init__(self):
        super().__init__()
        evdev = _import("evdev", "wayland")
        self.key_event = evdev.ecodes.EV_KEY
        try:
            self.device = evdev.UInput({self.key_event: list(KEY_CODES.values())}, name="reflex policy")
        except (OSError, evdev.UInputError) as error:
            raise PermissionError(
                f"/dev/uinput cannot be used ({error}). Let your group write to it, then log in again: "
                "sudo modprobe uinput && sudo setfacl -m g:input:rw /dev/uinput"
            ) from None

    def _send(self, name: str, down: bool):
        self.device.write(self.key_event, KEY_CODES[name], int(down))

    def _flush(self):
        self.device.syn()

    def close(self):
        self.hold(set())
        self.device.close()


class Ledger:
    """Tells our keys from a person's, which look alike when they are heard: ours were sent within 50 ms of it."""

    TOLERANCE_NS = 50_000_000

    def __init__(self, sender: Sender | None):
        self.sender, self.read = sender, 0  # entries of `sender.sent` taken over
        self.open: list[tuple[int, int, str, str]] = []  # (first ns, last ns, name, state) not heard yet
        self.ours: set[str] = set()  # keys whose last press was ours

    def note(self):
        """Call it after each `hold`: what was sent arrived between the time it was noted and now."""
        now = time.monotonic_ns()
        for sent_ns, name, state in self.sender.sent[self.read :] if self.sender else ():
            self.open.append((sent_ns - self.TOLERANCE_NS, now + self.TOLERANCE_NS, name, state))
        self.read = len(self.sender.sent) if self.sender else 0

    def is_ours(self, heard_ns: int, name: str, state: str) -> bool:
        """Whether an event heard, `state` "down", "up" or "repeat", was sent by us. Each entry is used once; repeats
        belong to whoever pressed the key."""
        if state == "repeat":
            return name in self.ours
        self.open = [entry for entry in self.open if entry[1] > heard_ns - 5_000_000_000]  # never heard
        for number, (first, last, key, direction) in enumerate(self.open):
            if (key, direction) == (name, state) and first <= heard_ns <= last:
                del self.open[number]
                (self.ours.add if state == "down" else self.ours.discard)(name)
                return True
        self.ours.discard(name)
        return False


class Watchdog:
    """A process (common/key_watchdog.py) that outlives this one and releases `names` on the X server when this one is
    gone, kill -9 included, or has not called `beat` for `silence_s`. It has a session of its own and notices the end by
    a closed pipe."""

    def __init__(self, display: str | None, names: list[str], silence_s: float = 2.0):
        codes = [str(KEY_CODES[name] + 8) for name in names]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("key_watchdog.py")), display or "", str(silence_s), *codes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_ready(self, timeout_s: float = 20):
        """Raises RuntimeError where it does not start: without it no key may be pressed."""
        ready = select.select([self.process.stdout], [], [], timeout_s)[0]
        if not ready or self.process.stdout.readline() != b"ready\n":
            self.process.kill()
            raise RuntimeError(
                f"the watchdog that releases keys did not start within {timeout_s:.0f} s. Try again with less running"
            )

    def beat(self):
        """We are alive. Raises RuntimeError where the watchdog is not."""
        try:
            os.write(self.process.stdin.fileno(), b".")
        except OSError:
            raise RuntimeError("the watchdog that releases keys has ended, so nothing more is pressed") from None

    def close(self, released: bool):
        """It goes at once where everything is released, otherwise it releases first."""
        with contextlib.suppress(OSError):
            if released:
                os.write(self.process.stdin.fileno(), b"q")
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Listener:
    """Hears every key, whichever window has the focus. A thread fills `heard` with (monotonic ns, name, pressed)."""

    def __init__(self):
        self.heard: queue.Queue[tuple[int, str, bool]] = queue.Queue()
        self.waiting: list[tuple[int, str, bool]] = []  # taken out of `heard` by `wait`
        self.thread: threading.Thread  # ends when nothing can be heard any more
        self.held: set[str] = set()  # as of the last `drain`; at first the keys that were held already

    def wait(self, seconds: float):
        """Until something is heard, at most `seconds`."""
        with contextlib.suppress(queue.Empty):
            self.waiting.append(self.heard.get(timeout=max(0.0, seconds)))

    def drain(self) -> list[tuple[int, str, str]]:
        """(monotonic ns, name, "down" | "up" | "repeat") of what was heard since the last call."""
        heard, self.waiting, events = self.waiting, [], []
        while not self.heard.empty():
            heard.append(self.heard.get())
        for now, name, pressed in heard:
            if pressed:
                events.append((now, name, "repeat" if name in self.held else "down"))
                self.held.add(name)
            elif name in self.held:
                events.append((now, name, "up"))
                self.held.discard(name)
        return events

    def pointer(self) -> tuple[int, int] | None:
        """(x, y) on the screen now; None where that cannot be known."""
        return None


class KeyListener(Listener):
    """X11, by the RECORD extension. The time is the server's own, which is CLOCK_MONOTONIC in ms: repeats can be
    delivered a second late but are stamped right. Close it before the X server."""

    def __init__(self, display: str | None = None):
        super().__init__()
        from Xlib.ext import record

        self.record = record
        self.control, self.X = _connect(display)
        self.data, _ = _connect(display)  # record_enable_context blocks its connection
        if not self.control.has_extension("RECORD"):
            raise ValueError(f"display {display} lacks the RECORD extension, keys cannot be heard. Use Xvfb or Xorg.")
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
        self.held = _names_down(self.control)

    def _listen(self):
        _ask(lambda: self.data.record_enable_context(self.context, self._receive))

    def _receive(self, reply):
        from Xlib.protocol import rq

        self.ready.set()  # the first reply only says that recording has started
        data = reply.data
        while reply.category == self.record.FromServer and len(data):
            event, data = rq.EventField(None).parse_binary_value(data, self.data.display, None, None)
            name = NAMES.get(event.detail - 8, f"KEYCODE_{event.detail}")
            now_ms = time.monotonic_ns() // 1_000_000
            age_ms = (now_ms - event.time + 2**31) % 2**32 - 2**31  # the server counts in 32 bits
            # X repeats a held key as further presses
            self.heard.put(((now_ms - age_ms) * 1_000_000, name, event.type == self.X.KeyPress))

    def pointer(self) -> tuple[int, int] | None:
        place = _ask(self.control.screen().root.query_pointer)
        return (place.root_x, place.root_y) if place else None

    def close(self):
        _ask(lambda: self.control.record_disable_context(self.context))
        _ask(self.control.sync)  # also flushes repeats that the server kept back
        self.thread.join(2)
        _ask(self.control.close)
        _ask(self.data.close)


class PynputListener(Listener):
    """Windows and macOS. Untested. The time is that of arrival; keys held already are heard at their first repeat."""

    def __init__(self):
        super().__init__()
        keyboard, mouse = _import("pynput.keyboard"), _import("pynput.mouse")
        words = PYNPUT.split()
        self.names = dict(zip(words[::2], words[1::2], strict=True))
        self.mouse = mouse.Controller()
        self.thread = keyboard.Listener(
            on_press=lambda key: self._hear(key, True), on_release=lambda key: self._hear(key, False)
        )
        self.thread.start()
        self.thread.wait()

    def _hear(self, key, pressed: bool):
        written = getattr(key, "name", None) or getattr(key, "char", None) or str(key)
        code = getattr(key, "vk", None) or 0
        if sys.platform == "win32" and chr(code) in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ":  # Ctrl changes the char
            written = chr(code)
        self.heard.put((time.monotonic_ns(), "KEY_" + self.names.get(written, written.upper()), pressed))

    def pointer(self) -> tuple[int, int] | None:
        x, y = self.mouse.position
        return int(x), int(y)

    def close(self):
        self.thread.stop()


class EvdevListener(Listener):
    """The Linux kernel's keyboards in /dev/input, with the kernel's time. Untested. It knows no pointer."""

    def __init__(self):
        super().__init__()
        import fcntl
        import selectors
        import struct

        evdev = _import("evdev", "wayland")
        self.selector, self.key_event = selectors.DefaultSelector(), evdev.ecodes.EV_KEY
        devices = [evdev.InputDevice(path) for path in evdev.list_devices()]
        self.devices = [d for d in devices if KEY_CODES["KEY_SPACE"] in d.capabilities().get(self.key_event, [])]
        if not self.devices:
            raise PermissionError(
                "no keyboard in /dev/input can be read. Join its group, then log in again: sudo usermod -aG input $USER"
            )
        for device in self.devices:
            fcntl.ioctl(device.fd, 0x400445A0, struct.pack("i", time.CLOCK_MONOTONIC))  # EVIOCSCLOCKID
            self.selector.register(device, selectors.EVENT_READ)
            self.held |= {NAMES.get(code, f"KEYCODE_{code + 8}") for code in device.active_keys()}
        self.thread = threading.Thread(target=self._listen, name="key-listener", daemon=True)
        self.thread.start()

    def _listen(self):
        try:
            while True:
                for ready, _ in self.selector.select():
                    for event in ready.fileobj.read():
                        if event.type == self.key_event:  # value 0 up, 1 down, 2 repeat
                            ns = event.sec * 1_000_000_000 + event.usec * 1000
                            self.heard.put((ns, NAMES.get(event.code, f"KEYCODE_{event.code + 8}"), event.value > 0))
        except (OSError, ValueError):  # closed, or the keyboard was unplugged
            pass

    def close(self):
        for device in self.devices:
            device.close()


def _names_down(display) -> set[str]:
    bits = display.query_keymap()  # 32 bytes, one bit per keycode
    codes = [code for code in range(256) if bits[code // 8] >> code % 8 & 1]
    return {NAMES.get(code - 8, f"KEYCODE_{code}") for code in codes}


def _import(name: str, extra: str = "live"):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} does not import ({error}). Install it: pip install -e '.[{extra}]'") from None


def _ask(call):
    """The X server's answer, or None where the window asked about, or the server itself, is gone."""
    from Xlib.error import ConnectionClosedError, XError

    try:
        return call()
    except (XError, ConnectionClosedError, OSError):
        return None


def _connect(display: str | None):
    """A connection to an X server, and the constants of python-xlib."""
    X, Display, error = _import("Xlib.X"), _import("Xlib.display").Display, _import("Xlib.error")
    try:
        return Display(display), X
    except (error.DisplayError, OSError) as failure:
        raise ConnectionError(
            f"no X server answers at {display or os.environ.get('DISPLAY', '')!r} ({failure}). Start one, for example: "
            "Xvfb :9 -screen 0 640x480x24"
        ) from None
