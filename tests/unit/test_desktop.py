"""What of the desktop needs none: how key events become rows, and the names of keys where other libraries give them.

pynput and evdev are not at hand in tests: modules of their shape stand in, so that at least our side runs.
"""

import enum
import os
import sys
import time
import types

import pytest

import record_session
from common import desktop
from common.desktop import EvdevListener, Listener, PynputListener, Screen
from common.sessions import KEY_CODES


def test_a_press_while_held_is_a_repeat_and_a_release_needs_a_press():
    listener = Listener()
    listener.held = {"KEY_LEFT"}  # already, when it began
    for ms, name, pressed in [(1, "KEY_A", True), (2, "KEY_A", True), (3, "KEY_A", False), (4, "KEY_A", True)]:
        listener.heard.put((ms, name, pressed))
    for ms, name in [(5, "KEY_LEFT"), (6, "KEY_LEFT")]:
        listener.heard.put((ms, name, False))
    assert listener.drain() == [
        (1, "KEY_A", "down"),
        (2, "KEY_A", "repeat"),
        (3, "KEY_A", "up"),
        (4, "KEY_A", "down"),
        (5, "KEY_LEFT", "up"),
    ]
    assert listener.held == {"KEY_A"} and listener.drain() == []


@pytest.fixture
def pynput(monkeypatch):
    """`press(key)` and `release(key)` of a listener that was given them."""

    class FakeListener:
        def __init__(self, on_press, on_release):
            FakeListener.press, FakeListener.release = staticmethod(on_press), staticmethod(on_release)

        def start(self): ...
        def wait(self): ...
        def stop(self): ...

    keyboard = types.ModuleType("pynput.keyboard")
    keyboard.Listener = FakeListener
    mouse = types.ModuleType("pynput.mouse")
    mouse.Controller = lambda: types.SimpleNamespace(position=(12.7, 30.0))
    modules = {"pynput": types.ModuleType("pynput"), "pynput.keyboard": keyboard, "pynput.mouse": mouse}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return FakeListener


def test_pynput_keys_get_evdev_names(pynput):
    Key = enum.Enum("Key", "space right ctrl_l alt_gr page_up f9 enter caps_lock esc")
    listener = PynputListener()
    characters = [types.SimpleNamespace(char=char, vk=None) for char in "aA7\\;?!"]
    for key in (*Key, *characters):
        pynput.press(key)
    pynput.release(Key.space)
    expected = "SPACE RIGHT LEFTCTRL RIGHTALT PAGEUP F9 ENTER CAPSLOCK ESC A A 7 BACKSLASH SEMICOLON SLASH 1".split()
    events = listener.drain()
    assert [name for _, name, _ in events] == [f"KEY_{name}" for name in expected] + ["KEY_SPACE"]
    assert [state for _, _, state in events][9:11] == ["down", "repeat"] and events[-1][2] == "up"
    assert {name for _, name, _ in events} <= set(KEY_CODES)
    assert listener.pointer() == (12, 30)


def test_every_name_in_the_pynput_table_is_a_key():
    words = desktop.PYNPUT.split()
    assert {f"KEY_{name}" for name in words[1::2]} <= set(KEY_CODES)
    assert len(set(words[::2])) == len(words) // 2


def test_evdev_events_carry_the_kernels_time(monkeypatch):
    read_end, write_end = os.pipe()
    event = types.SimpleNamespace

    class Device:
        fd = read_end

        def __init__(self, path): ...
        def fileno(self):
            return self.fd

        def capabilities(self):
            return {1: [KEY_CODES["KEY_SPACE"]]}

        def active_keys(self):
            return [KEY_CODES["KEY_LEFT"]]

        def read(self):
            if not os.read(read_end, 1):
                raise OSError("unplugged")
            yield event(type=4, code=4, value=57, sec=5, usec=0)  # EV_MSC
            yield event(type=1, code=KEY_CODES["KEY_SPACE"], value=1, sec=5, usec=7)
            yield event(type=1, code=KEY_CODES["KEY_SPACE"], value=2, sec=6, usec=0)
            yield event(type=1, code=KEY_CODES["KEY_LEFT"], value=0, sec=7, usec=0)

    evdev = types.ModuleType("evdev")
    evdev.InputDevice, evdev.list_devices, evdev.ecodes = Device, lambda: ["event0"], event(EV_KEY=1)
    monkeypatch.setitem(sys.modules, "evdev", evdev)
    asked = []
    monkeypatch.setattr("fcntl.ioctl", lambda fd, request, clock: asked.append((fd, request, clock)))
    listener = EvdevListener()
    assert listener.held == {"KEY_LEFT"}
    assert asked == [(read_end, 0x40000000 | 4 << 16 | ord("E") << 8 | 0xA0, b"\1\0\0\0")]  # _IOW('E', 0xa0, int)
    os.write(write_end, b"x")
    while listener.heard.qsize() < 3:
        time.sleep(0.001)
    assert listener.drain() == [
        (5_000_007_000, "KEY_SPACE", "down"),
        (6_000_000_000, "KEY_SPACE", "repeat"),
        (7_000_000_000, "KEY_LEFT", "up"),
    ]
    os.close(write_end)
    listener.thread.join(5)
    assert not listener.thread.is_alive()
    os.close(read_end)


def test_a_wayland_session_is_refused_with_a_way_out(monkeypatch):
    pytest.importorskip("mss")
    monkeypatch.setenv("XDG_SESSION_TYPE", "wayland")
    with pytest.raises(ConnectionError, match="X11 session.*Xwayland"):
        Screen()


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mss", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[live\]'"):
        Screen(":0")


@pytest.mark.parametrize(
    "args, words",
    [
        ({"fps": 0}, "expected 1 to 60"),
        ({"seconds": -1}, "expected 1 to 60, 0 or more"),
        ({"crf": 52}, "0 to 51"),
        ({"start_key": "KEY_SPACE"}, "expected a key that no game plays with"),
        ({"stop_key": "KEY_BACKSLASH"}, "expected a key that no game plays with"),
        ({"level": "welcome_antarctica"}, "belongs to a scripted player"),
        ({"demonstrator": "skilled", "window": "SuperTux"}, "for a person's recording"),
    ],
)
def test_flags_that_cannot_be_met_are_named(tmp_path, args, words):
    with pytest.raises(SystemExit, match=words):
        record_session.main(record_session.Args(output=tmp_path / "out", **args))
    assert not (tmp_path / "out").exists()
