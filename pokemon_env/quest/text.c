// Words, boxes, bars and dialogue on the upper layer, 30 x 20 tiles.
#include "quest.h"

u32 length(const char *s) {
    u32 n = 0;
    while (s[n]) n++;
    return n;
}

void put(int x, int y, int tile, int palette) { UI_SCREEN[y * 32 + x] = tile | palette << 12; }

void print(int x, int y, const char *s, int palette) {
    for (; *s; s++) put(x++, y, *s, palette);
}

void print_number(int x, int y, u32 n, int palette) {
    char digits[12];
    int i = 11;
    digits[i] = 0;
    do {
        digits[--i] = '0' + n % 10;
        n /= 10;
    } while (n);
    print(x, y, digits + i, palette);
}

void fill(int x, int y, int w, int h, int palette) {
    for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++) put(x + j, y + i, U_FRAME + 10, palette);
}

void box(int x, int y, int w, int h, int palette) {
    for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++) {
            int row = i == 0 ? 0 : i == h - 1 ? 2 : 1, column = j == 0 ? 0 : j == w - 1 ? 2 : 1;
            put(x + j, y + i, U_FRAME + 3 * row + column, palette);
        }
}

void clear(int x, int y, int w, int h) {
    for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++) put(x + j, y + i, U_BLANK, 0);
}

// A bar w tiles wide and two high.
void bar(int x, int y, int w, u32 value, u32 max) {
    u32 full = (value * w * 8 + max - 1) / max;
    int palette = value * 2 > max ? P_GREEN : value * 4 > max ? P_YELLOW : P_RED;
    for (int low = 0; low < 2; low++) {
        for (int i = 0; i < w; i++) {
            int here_full = (int)full - 8 * i;
            here_full = here_full < 0 ? 0 : here_full > 8 ? 8 : here_full;
            put(x + i, y + low, U_BAR + 2 * here_full + low, palette);
        }
    }
}

// Letters four times as large, from quarter blocks.
void big(int x, int y, const char *s, int palette) {
    for (; *s; s++, x += 4)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                const u8 *g = glyphs[*s - 32] + 2 * i;
                int upper = g[0] >> (6 - 2 * j) & 3, lower = g[1] >> (6 - 2 * j) & 3;
                int mask = upper >> 1 | (upper & 1) << 1 | (lower >> 1) << 2 | (lower & 1) << 3;
                put(x + j, y + i, mask ? U_QUAD + mask : U_FRAME + 10, palette);
            }
}

// Shows pages one after the other in the lower box; A or B goes on. '\n' starts a line, '\f' a page.
void message(const char *s) {
    u8 menu = MENU;
    MENU = MENU_MESSAGE;
    while (*s) {
        int x = 2, y = 15;
        box(0, 14, 30, 6, P_TEXT);
        for (; *s && *s != '\f'; s++) {
            if (*s == '\n') x = 2, y += 2;
            else put(x++, y, *s, P_TEXT);
        }
        put(27, 18, U_FRAME + 9, P_TEXT);
        if (*s) s++;
        do frame();
        while (!(pressed & (KEY_A | KEY_B)));
    }
    clear(0, 14, 30, 6);
    MENU = menu;
}

// Dialogue on the field: the controls are locked while the box is up.
void say(const char *pages) {
    LOCKED = 1, SCRIPT = 0, MESSAGE_BOX = 1;
    message(pages);
    LOCKED = 0, SCRIPT = 2, MESSAGE_BOX = 0;
}
