#!/bin/sh
# Builds the game with Debian's gcc-arm-none-eabi. Usage: ./build.sh [output]; the output is quest.gba here by default.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
case "${1:-}" in
"") output="$here/quest.gba" ;;
/*) output="$1" ;;
*) output="$PWD/$1" ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$here" # relative names only, so that nothing of the place gets into the result
arm-none-eabi-gcc -mcpu=arm7tdmi -mthumb -mthumb-interwork -Os -std=c11 -Wall -Wextra -Werror \
    -ffreestanding -fno-builtin -fno-tree-loop-distribute-patterns -fno-common -nostdlib -nostartfiles \
    -Wl,--build-id=none -T gba.ld crt0.s main.c field.c battle.c maps.c text.c gfx.c -lgcc -o "$work/quest.elf"
arm-none-eabi-objcopy -O binary "$work/quest.elf" "$work/quest.gba"
cp "$work/quest.gba" "$output.part"
chmod 644 "$output.part" # objcopy marks its result executable
mv "$output.part" "$output"
