"""A Game Boy Advance in this process: stable-retro's mGBA, or another libretro core through libretro.py.

Both have one interface: run, screen, memory, state, load_state, close. Their cores keep global state, so a process
holds one emulator at a time; parallel games need spawned processes.
"""

import ctypes
import gc
import struct
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BUTTONS = ("A", "B", "START", "SELECT", "UP", "DOWN", "LEFT", "RIGHT", "L", "R")
LIBRETRO_BITS = dict(B=0, SELECT=2, START=3, UP=4, DOWN=5, LEFT=6, RIGHT=7, A=8, L=10, R=11)  # both backends use them
HEIGHT, WIDTH = 160, 240
EWRAM, IWRAM, SAVE_RAM = 0x02000000, 0x03000000, 0x0E000000
# mGBA's raw state: version, BIOS checksum, CRC-32 of the ROM; then, among others, both memories
STATE_IWRAM, STATE_EWRAM, STATE_BYTES = 0x19000, 0x21000, 0x61000
STATE_MAGIC = 0x01000000

_open = None  # weak reference to the one emulator


def open_emulator(rom_path: Path | str, core: Path | str | None = None) -> "Emulator":
    """Start `rom_path` in stable-retro's core, or in the libretro core in the file `core`.

    Raises FileNotFoundError without the ROM or the core, ValueError for a file that the core does not take,
    RuntimeError where this process already has an emulator."""
    for path, mend in ((rom_path, "Give the path of a .gba file."), (core, "Give the path of mgba_libretro.so.")):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing. {mend}")
    return RetroEmulator(rom_path) if core is None else LibretroEmulator(rom_path, core)


class Emulator:
    """What both backends share. `name` says which core runs, `version` which version of it."""

    name = version = ""

    def __init__(self, rom_path: Path | str):
        global _open
        gc.collect()  # an environment that was dropped without close() lets go of its emulator
        if _open is not None and _open() is not None:
            raise RuntimeError(
                "this process already runs an emulator and can hold only one: close() the other environment, or put "
                'each in its own process, as gymnasium.vector.AsyncVectorEnv(..., context="spawn") does'
            )
        self.rom_path = Path(rom_path)
        self.rom = self.rom_path.read_bytes()
        self.start()
        _open = weakref.ref(self)
        self.power_on = self.state()
        self.power_on_save = self.save_ram()

    def run(self, buttons: Sequence[str], frames: int):
        """Emulate `frames` frames with `buttons` held down."""
        raise NotImplementedError

    def screen(self) -> np.ndarray:
        """The last frame, a new uint8 (160, 240, 3) RGB array in canonical colour."""
        raise NotImplementedError

    def memory(self) -> tuple[bytes, bytes]:
        """Copies of EWRAM (256 KiB from 0x02000000) and IWRAM (32 KiB from 0x03000000)."""
        raise NotImplementedError

    def state(self) -> bytes:
        """The machine's state. The cartridge's save memory is not always in it."""
        raise NotImplementedError

    def load_state(self, state: bytes, source: str = "the state"):
        """Go back to `state`. Raises ValueError where it is of another ROM or of a newer core, or did not take effect:
        cores say yes to states that they ignore."""
        check_state(state, self.power_on, self.rom, source, self.name)
        self._set_state(state)
        ewram, iwram = self.memory()
        wanted = (state[STATE_EWRAM:STATE_BYTES], state[STATE_IWRAM:STATE_EWRAM])
        if (ewram, iwram) != wanted:
            raise ValueError(
                f"{source}: the core ({self.name} {self.version}) took it without a word and its memory differs from "
                "it: another core wrote it. Run with the core that wrote it (core=PATH), or make it again."
            )

    def reset(self):
        """Back to power-on, the cartridge's save memory included."""
        self._set_state(self.power_on)
        if self.save_ram() != self.power_on_save:
            self._set_save_ram(self.power_on_save)

    def close(self):
        """Free the emulator, so that this process can start another. Closing twice is fine."""
        global _open
        if _open is not None and _open() is self:
            _open = None
        self.stop()
        gc.collect()


class RetroEmulator(Emulator):
    """The mGBA core in the stable-retro package."""

    def start(self):
        try:
            import stable_retro
        except ImportError as error:
            raise ImportError(
                f"stable_retro does not import ({error}). Install it with `pip install stable-retro`, or give "
                "core=PATH of a libretro mGBA core and `pip install libretro.py`."
            ) from error
        self.name, self.version = "stable-retro mgba", stable_retro.__version__.strip()
        try:
            self.core = stable_retro.RetroEmulator(str(self.rom_path))
        except RuntimeError as error:
            raise ValueError(
                f"{self.rom_path}: stable-retro cannot start it ({error}). Expected a .gba file."
            ) from None
        self.data = stable_retro.data.GameData()  # kept: its memory must not outlive it
        self.core.configure_data(self.data)
        self.core.step()  # the memory blocks exist from the first frame on
        self.ram = self.data.memory
        self.masks = {}

    def run(self, buttons, frames):
        key = tuple(buttons)
        if key not in self.masks:
            self.masks[key] = np.zeros(12, np.uint8)
            self.masks[key][[LIBRETRO_BITS[name] for name in key]] = 1
        self.core.set_button_mask(self.masks[key], 0)
        step = self.core.step
        for _ in range(frames):
            step()

    def screen(self):
        return canonical_colour(self.core.get_screen())

    def memory(self):
        blocks = self.ram.blocks
        return blocks[EWRAM], blocks[IWRAM]

    def state(self):
        return self.core.get_state()

    def _set_state(self, state):
        if not self.core.set_state(state):
            raise ValueError(f"{self.name} {self.version} refused a state of {len(state):,} bytes")

    def save_ram(self):
        return self.ram.blocks.get(SAVE_RAM, b"")

    def _set_save_ram(self, data):
        now = np.frombuffer(self.save_ram(), np.uint8)
        for i in np.flatnonzero(now != np.frombuffer(data, np.uint8)).tolist():
            self.ram.assign(SAVE_RAM + i, "|u1", data[i])

    def stop(self):
        self.ram = self.data = self.core = None


class LibretroEmulator(Emulator):
    """Any libretro mGBA core, through the libretro.py package."""

    def __init__(self, rom_path: Path | str, core: Path | str):
        self.core_path, self.session = str(core), None
        super().__init__(rom_path)

    def start(self):
        try:
            import libretro
        except ImportError as error:
            raise ImportError(
                f"libretro does not import ({error}). core=PATH needs it: `pip install libretro.py`."
            ) from error
        self.drivers = audio, pad, video = _libretro_drivers()
        builder = libretro.defaults(self.core_path).with_content(str(self.rom_path)).with_log(None)
        try:
            session = builder.with_audio(audio).with_input(pad).with_video(video).build()
            session.__enter__()
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.core_path} cannot start {self.rom_path} ({error}). Expected a libretro core of mGBA."
            ) from None
        self.session = session
        about = session.core.get_system_info()
        self.name, self.version = about.library_name.decode(), about.library_version.decode()
        self.run((), 2)  # as many as stable-retro has run by then: both begin alike
        found = {d.start: d for d in session.memory_maps or ()}
        if EWRAM not in found or IWRAM not in found:
            self.stop()
            raise ValueError(
                f"{self.core_path} ({self.name} {self.version}) shows no memory at 0x02000000 and 0x03000000. "
                "Expected a libretro core of mGBA."
            )
        self.regions = [(found[start].ptr + found[start].offset, found[start].len) for start in (EWRAM, IWRAM)]

    def run(self, buttons, frames):
        self.drivers[1].mask = sum(1 << LIBRETRO_BITS[name] for name in buttons)
        for _ in range(frames):
            self.session.run()

    def screen(self):
        video = self.drivers[2]
        height, width, pitch = video.size
        kind = video.pixel_format.name
        if kind == "XRGB8888":
            rows = np.frombuffer(video.picture, np.uint8).reshape(height, pitch)
            return canonical_colour(np.ascontiguousarray(rows[:, : 4 * width].reshape(height, width, 4)[..., 2::-1]))
        pixels = np.frombuffer(video.picture, np.uint16).reshape(height, pitch // 2)[:, :width]
        red = 11 if kind == "RGB565" else 10
        rgb = np.stack([pixels >> (red - 3), pixels >> (red - 8), pixels << 3], -1)
        return canonical_colour(rgb.astype(np.uint8))

    def memory(self):
        return tuple(ctypes.string_at(*region) for region in self.regions)

    def state(self):
        data = bytearray(self.session.core.serialize_size())
        if not self.session.core.serialize(data):
            raise RuntimeError(f"{self.name} {self.version} gave no state")
        return bytes(data)

    def _set_state(self, state):
        if not self.session.core.unserialize(state):
            raise ValueError(f"{self.name} {self.version} refused a state of {len(state):,} bytes")

    def _save_view(self) -> memoryview:
        return self.session.core.get_memory(0) or memoryview(b"")

    def save_ram(self):
        return bytes(self._save_view())

    def _set_save_ram(self, data):
        self._save_view()[:] = data

    def stop(self):
        if self.session is not None:
            self.session.__exit__(None, None, None)
        self.session, self.regions = None, []


def _libretro_drivers():
    """(audio, pad, video) for libretro.py: no sound, a pad with a bit mask, the last frame as it comes."""
    from libretro.api.input import InputDevice
    from libretro.drivers import ArrayAudioDriver, ArrayVideoDriver, IterableInputDriver

    class Silence(ArrayAudioDriver):  # the package's own keeps all samples
        def sample(self, left, right):
            pass

        def sample_batch(self, frames):
            return len(frames) // 2

    class Pad(IterableInputDriver):
        mask = 0

        def poll(self):
            pass

        def state(self, port, device, index, _id):
            if device != InputDevice.JOYPAD or int(port) != 0:
                return 0
            return self.mask if int(_id) == 256 else self.mask >> int(_id) & 1  # 256 asks for all buttons at once

    class Frame(ArrayVideoDriver):
        picture, size = bytes(2 * HEIGHT * WIDTH), (HEIGHT, WIDTH, 2 * WIDTH)

        def refresh(self, data, width, height, pitch):
            if isinstance(data, memoryview):  # else: the frame before stays
                self.picture, self.size = bytes(data), (height, width, pitch)

    return Silence(), Pad(), Frame()


_LOW = np.empty(HEIGHT * WIDTH * 3 // 8, np.uint64)  # scratch: a new array each time costs more than the sums


def canonical_colour(rgb: np.ndarray) -> np.ndarray:
    """The GBA's 5 bits a channel spread over 0..255, in place: cores fill the low three bits differently.
    uint8, contiguous."""
    words = rgb.reshape(-1).view(np.uint64)
    words &= 0xF8F8F8F8F8F8F8F8
    low = np.right_shift(words, 5, out=_LOW[: len(words)])
    low &= 0x0707070707070707
    words |= low
    return rgb


def check_state(state: bytes, own: bytes, rom: bytes, source: str, core: str):
    """Raise ValueError where `state` cannot be loaded by the core that wrote `own` for `rom`."""
    version, _, crc = struct.unpack_from("<3I", state.ljust(12, b"\0"))
    newest, begins = struct.unpack_from("<I", own)[0], f"begins with {state[:4].hex(' ')}"
    expected, mend = own[:4].hex(" "), "make it again with save_state()"
    if version & 0xFFFFFF00 != STATE_MAGIC:
        raise ValueError(f"{source} {begins}, expected {expected} as in mGBA's save states. Unpack it, or {mend}.")
    if len(state) < STATE_BYTES:
        raise ValueError(f"{source} has {len(state):,} bytes, expected {STATE_BYTES:,} or more: cut off; {mend}")
    if version > newest:
        raise ValueError(
            f"{source} {begins}: a save state of version {version - STATE_MAGIC}. The core ({core}) reads up to "
            f"version {newest - STATE_MAGIC} ({expected}). Run with a newer mGBA core (core=PATH), or {mend}."
        )
    if crc != zlib.crc32(rom):
        raise ValueError(
            f"{source} belongs to a ROM with CRC-32 {crc:08x}, expected {zlib.crc32(rom):08x}, the ROM that runs. Give "
            f"the ROM that it was made with, or {mend}."
        )
