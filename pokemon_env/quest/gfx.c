// Pictures: everything is drawn here at start, from shapes and a few letter grids, and packed into tiles.
#include "quest.h"

// Six pixels wide letters from space to Z, one byte a row, bit 6 leftmost.
const u8 glyphs[59][8] = {
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}, //  
    {0x00, 0x18, 0x18, 0x18, 0x18, 0x00, 0x18, 0x18}, // !
    {0x00, 0x24, 0x24, 0x00, 0x00, 0x00, 0x00, 0x00}, // "
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}, // #
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}, // $
    {0x00, 0x64, 0x6C, 0x18, 0x30, 0x6C, 0x4C, 0x00}, // %
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}, // &
    {0x00, 0x18, 0x18, 0x30, 0x00, 0x00, 0x00, 0x00}, // '
    {0x00, 0x0C, 0x18, 0x30, 0x30, 0x30, 0x18, 0x0C}, // (
    {0x00, 0x30, 0x18, 0x0C, 0x0C, 0x0C, 0x18, 0x30}, // )
    {0x00, 0x00, 0x28, 0x10, 0x38, 0x10, 0x28, 0x00}, // *
    {0x00, 0x00, 0x18, 0x18, 0x7E, 0x18, 0x18, 0x00}, // +
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x18, 0x18, 0x30}, // ,
    {0x00, 0x00, 0x00, 0x00, 0x7C, 0x00, 0x00, 0x00}, // -
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x18, 0x18}, // .
    {0x00, 0x06, 0x0C, 0x0C, 0x18, 0x30, 0x30, 0x60}, // /
    {0x00, 0x3C, 0x66, 0x6E, 0x76, 0x66, 0x66, 0x3C}, // 0
    {0x00, 0x18, 0x38, 0x18, 0x18, 0x18, 0x18, 0x7E}, // 1
    {0x00, 0x3C, 0x66, 0x06, 0x1C, 0x30, 0x60, 0x7E}, // 2
    {0x00, 0x3C, 0x66, 0x06, 0x1C, 0x06, 0x66, 0x3C}, // 3
    {0x00, 0x0C, 0x1C, 0x3C, 0x6C, 0x7E, 0x0C, 0x0C}, // 4
    {0x00, 0x7E, 0x60, 0x7C, 0x06, 0x06, 0x66, 0x3C}, // 5
    {0x00, 0x3C, 0x60, 0x7C, 0x66, 0x66, 0x66, 0x3C}, // 6
    {0x00, 0x7E, 0x06, 0x0C, 0x18, 0x18, 0x18, 0x18}, // 7
    {0x00, 0x3C, 0x66, 0x66, 0x3C, 0x66, 0x66, 0x3C}, // 8
    {0x00, 0x3C, 0x66, 0x66, 0x3E, 0x06, 0x0C, 0x38}, // 9
    {0x00, 0x00, 0x18, 0x18, 0x00, 0x18, 0x18, 0x00}, // :
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}, // ;
    {0x00, 0x06, 0x1C, 0x30, 0x60, 0x30, 0x1C, 0x06}, // <
    {0x00, 0x00, 0x00, 0x7C, 0x00, 0x7C, 0x00, 0x00}, // =
    {0x00, 0x60, 0x38, 0x0C, 0x06, 0x0C, 0x38, 0x60}, // >
    {0x00, 0x3C, 0x66, 0x06, 0x1C, 0x00, 0x18, 0x18}, // ?
    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00}, // @
    {0x00, 0x3C, 0x66, 0x66, 0x7E, 0x66, 0x66, 0x66}, // A
    {0x00, 0x7C, 0x66, 0x66, 0x7C, 0x66, 0x66, 0x7C}, // B
    {0x00, 0x3C, 0x66, 0x60, 0x60, 0x60, 0x66, 0x3C}, // C
    {0x00, 0x78, 0x6C, 0x66, 0x66, 0x66, 0x6C, 0x78}, // D
    {0x00, 0x7E, 0x60, 0x60, 0x78, 0x60, 0x60, 0x7E}, // E
    {0x00, 0x7E, 0x60, 0x60, 0x78, 0x60, 0x60, 0x60}, // F
    {0x00, 0x3E, 0x60, 0x60, 0x6E, 0x66, 0x66, 0x3E}, // G
    {0x00, 0x66, 0x66, 0x66, 0x7E, 0x66, 0x66, 0x66}, // H
    {0x00, 0x7E, 0x18, 0x18, 0x18, 0x18, 0x18, 0x7E}, // I
    {0x00, 0x0E, 0x06, 0x06, 0x06, 0x66, 0x66, 0x3C}, // J
    {0x00, 0x66, 0x6C, 0x78, 0x70, 0x78, 0x6C, 0x66}, // K
    {0x00, 0x60, 0x60, 0x60, 0x60, 0x60, 0x60, 0x7E}, // L
    {0x00, 0x66, 0x7E, 0x7E, 0x66, 0x66, 0x66, 0x66}, // M
    {0x00, 0x66, 0x76, 0x76, 0x7E, 0x6E, 0x6E, 0x66}, // N
    {0x00, 0x3C, 0x66, 0x66, 0x66, 0x66, 0x66, 0x3C}, // O
    {0x00, 0x7C, 0x66, 0x66, 0x7C, 0x60, 0x60, 0x60}, // P
    {0x00, 0x3C, 0x66, 0x66, 0x66, 0x6E, 0x66, 0x3E}, // Q
    {0x00, 0x7C, 0x66, 0x66, 0x7C, 0x78, 0x6C, 0x66}, // R
    {0x00, 0x3C, 0x66, 0x60, 0x3C, 0x06, 0x66, 0x3C}, // S
    {0x00, 0x7E, 0x18, 0x18, 0x18, 0x18, 0x18, 0x18}, // T
    {0x00, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x3C}, // U
    {0x00, 0x66, 0x66, 0x66, 0x66, 0x3C, 0x3C, 0x18}, // V
    {0x00, 0x66, 0x66, 0x66, 0x66, 0x7E, 0x7E, 0x66}, // W
    {0x00, 0x66, 0x66, 0x3C, 0x18, 0x3C, 0x66, 0x66}, // X
    {0x00, 0x66, 0x66, 0x3C, 0x18, 0x18, 0x18, 0x18}, // Y
    {0x00, 0x7E, 0x06, 0x0C, 0x18, 0x30, 0x60, 0x7E}, // Z
};

// Canvas: one byte a pixel, rows of 64 -----------------------------------------------------------------------------
static void wipe(int w, int h, int c) {
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++) CANVAS[y * 64 + x] = c;
}

static void dot(int x, int y, int c) { CANVAS[y * 64 + x] = c; }

static void rect(int x0, int y0, int w, int h, int c) {
    for (int y = y0; y < y0 + h; y++)
        for (int x = x0; x < x0 + w; x++) CANVAS[y * 64 + x] = c;
}

// A filled ellipse; centre and radii in half pixels, so that both even and odd sizes are symmetric.
static void oval(int cx, int cy, int rx, int ry, int c) {
    int limit = rx * rx * ry * ry;
    for (int y = (cy - ry) / 2; y <= (cy + ry) / 2; y++) {
        int dy = 2 * y + 1 - cy, rest = limit - dy * dy * rx * rx;
        if (y < 0 || y > 63 || rest < 0) continue;
        for (int x = (cx - rx) / 2; x <= (cx + rx) / 2; x++) {
            int dx = 2 * x + 1 - cx;
            if (x >= 0 && x < 64 && dx * dx * ry * ry <= rest) CANVAS[y * 64 + x] = c;
        }
    }
}

// A filled triangle with a level base: from the tip down (or up, h < 0) to a base of 2 * half + 1 pixels.
static void wedge(int x, int y, int half, int h, int c) {
    int n = h < 0 ? -h : h;
    for (int i = 0; i < n; i++) {
        int reach = half * i / (n - 1);
        for (int dx = -reach; dx <= reach; dx++) dot(x + dx, h < 0 ? y - i : y + i, c);
    }
}

// A dark line around what is drawn on colour 0.
static void outline(int w, int h, int c) {
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++) {
            u8 *p = CANVAS + y * 64 + x;
            if (*p) continue;
            if ((x > 0 && p[-1] && p[-1] != c) || (x < w - 1 && p[1] && p[1] != c) 
                || (y > 0 && p[-64] && p[-64] != c) ||
                (y < h - 1 && p[64] && p[64] != c))
                *p = c;
        }
}

// Packs the canvas into 4-bit tiles, row by row of tiles.
static void pack(volatile u16 *to, int w, int h) {
    for (int ty = 0; ty < h; ty += 8)
        for (int tx = 0; tx < w; tx += 8)
            for (int y = 0; y < 8; y++) {
                const u8 *p = CANVAS + (ty + y) * 64 + tx;
                *to++ = p[0] | p[1] << 4 | p[2] << 8 | p[3] << 12;
                *to++ = p[4] | p[5] << 4 | p[6] << 8 | p[7] << 12;
            }
}

static void pack_metatile(int m) { pack(MAP_TILES + m * 64, 16, 16); }

// Terrain: colours 1-3 ground light to dark, 4-6 tree, 7 trunk, 8-9 path, 10-11 water, 12 white, 13 red, 14 yellow,
// 15 dark
static void blades(int x, int y, int c) {
    dot(x, y + 1, c), dot(x + 1, y, c), dot(x + 2, y + 1, c);
}

static void ground(void) {
    wipe(16, 16, 1);
    blades(2, 3, 2), blades(10, 1, 2), blades(6, 9, 2), blades(12, 12, 2);
}

static void flower(int x, int y, int c, int middle) {
    dot(x, y + 3, 3), dot(x + 1, y + 4, 3), dot(x + 2, y + 3, 3);
    rect(x, y, 3, 3, c);
    dot(x + 1, y + 1, middle);
}

static void terrain(void) {
    for (int v = 0; v < 8; v++) {
        ground();
        if (v == 1) blades(3, 11, 3), blades(9, 5, 3), blades(5, 5, 3);
        if (v == 2) flower(3, 4, 13, 14), flower(10, 9, 13, 14);
        if (v == 3) flower(9, 3, 14, 13), flower(4, 9, 14, 13);
        if (v == 4) oval(12, 20, 7, 5, 9), oval(11, 19, 4, 3, 12), oval(24, 12, 5, 4, 9);
        if (v == 5) oval(16, 16, 13, 9, 2), oval(15, 14, 7, 4, 3);
        if (v == 6) flower(6, 6, 12, 14), flower(11, 2, 12, 14), flower(2, 11, 12, 14);
        if (v == 7) rect(3, 5, 9, 2, 3), rect(5, 9, 9, 2, 3);
        pack_metatile(M_GRASS + v);
    }
    for (int v = 0; v < 4; v++) {
        wipe(16, 16, 8);
        dot(3, 4, 9), dot(11, 2, 9), dot(7, 10, 9), dot(13, 13, 9), dot(2, 13, 9);
        if (v == 1) oval(10, 10, 5, 4, 9), oval(22, 22, 6, 4, 9);
        if (v == 2) rect(4, 7, 7, 2, 9), rect(8, 12, 5, 1, 9);
        if (v == 3) oval(21, 9, 8, 5, 9), oval(20, 8, 5, 2, 12);
        pack_metatile(M_PATH + v);
    }
    wipe(16, 16, 2);
    for (int row = 0; row < 2; row++)
        for (int i = 0; i < 4; i++) {
            int x = i * 4 + row * 2, y = row * 8;
            for (int k = 0; k < 7; k++) dot((x + 1) & 15, y + 1 + k, 6), dot((x + 2) & 15, y + (k > 1 ? k : 1), 5);
            dot(x & 15, y + 3, 6), dot(x & 15, y + 4, 5), dot((x + 3) & 15, y + 2, 6), dot((x + 3) & 15, y + 3, 4);
        }
    pack_metatile(M_TALL);
    wipe(16, 16, 3);
    rect(6, 11, 4, 5, 7);
    oval(16, 14, 16, 14, 15), oval(16, 13, 14, 12, 6), oval(15, 11, 12, 9, 5), oval(12, 8, 6, 4, 4),
        oval(21, 12, 4, 3, 4);
    pack_metatile(M_TREE);
    wipe(16, 16, 3);
    rect(6, 12, 4, 4, 7);
    wedge(8, 3, 7, 11, 15), wedge(8, 2, 6, 11, 6), wedge(8, 0, 5, 8, 15), wedge(8, 1, 4, 6, 5), wedge(7, 3, 2, 3, 4);
    wedge(7, 7, 2, 4, 5);
    pack_metatile(M_PINE);
    wipe(16, 16, 11);
    rect(1, 3, 5, 1, 10), rect(2, 4, 3, 1, 12), rect(9, 6, 5, 1, 10), rect(3, 11, 6, 1, 10), rect(5, 12, 3, 1, 12);
    rect(11, 13, 4, 1, 10);
    pack_metatile(M_WATER);
    ground();
    rect(0, 5, 16, 3, 12), rect(0, 8, 16, 1, 9), rect(0, 11, 16, 2, 12), rect(0, 13, 16, 1, 9);
    for (int x = 2; x < 16; x += 8) rect(x, 2, 4, 13, 12), rect(x + 3, 3, 1, 12, 9), rect(x, 15, 4, 1, 15);
    pack_metatile(M_FENCE);
    ground();
    flower(1, 1, 13, 14), flower(6, 2, 14, 13), flower(11, 1, 12, 14), flower(2, 9, 12, 14), flower(7, 10, 13, 14);
    flower(12, 9, 14, 13);
    pack_metatile(M_BED);
    ground();
    oval(16, 20, 15, 11, 15), oval(16, 18, 13, 10, 9), oval(14, 15, 9, 6, 8), oval(11, 13, 4, 3, 12);
    pack_metatile(M_ROCK);
    wipe(16, 16, 6);
    rect(0, 0, 16, 5, 4), rect(0, 5, 16, 1, 15), rect(0, 14, 16, 2, 15);
    rect(1, 6, 4, 7, 5), rect(6, 6, 5, 5, 5), rect(12, 7, 3, 7, 5), rect(3, 1, 6, 1, 12), rect(11, 3, 4, 1, 5);
    pack_metatile(M_CLIFF);
    for (int with = 0; with < 2; with++) { // the table, then the table with a bag on it
        ground();
        rect(0, 7, 16, 9, 15), rect(1, 8, 14, 4, 14), rect(1, 12, 3, 3, 7), rect(12, 12, 3, 3, 7), rect(4, 12, 8, 3, 3);
        if (with) {
            oval(16, 10, 11, 9, 15), oval(16, 10, 9, 7, 13), rect(5, 1, 6, 2, 15), rect(6, 6, 4, 2, 12), dot(5, 4, 12);
            rect(4, 9, 9, 1, 13);
        }
        pack_metatile(with ? M_TABLE_BAG : M_TABLE);
    }
    wipe(16, 16, 8); // a shut gate: bars in red and white
    rect(0, 0, 16, 16, 15), rect(1, 1, 14, 14, 13), rect(1, 4, 14, 3, 12), rect(1, 10, 14, 3, 12),
        rect(4, 1, 1, 14, 15);
    rect(7, 1, 2, 14, 15), rect(11, 1, 1, 14, 15);
    pack_metatile(M_GATE);
    wipe(16, 16, 8);
    dot(3, 8, 9), dot(11, 9, 9), rect(0, 0, 16, 2, 13), rect(0, 14, 16, 2, 13), rect(0, 2, 16, 1, 15),
        rect(0, 13, 16, 1, 15);
    pack_metatile(M_GATE_OPEN);
    ground();
    rect(7, 9, 2, 6, 15), rect(1, 1, 14, 9, 15), rect(2, 2, 12, 7, 8), rect(4, 4, 8, 1, 7), rect(4, 6, 6, 1, 7);
    pack_metatile(M_SIGN);
}

// Houses: 2-4 roof, 5-7 wall, 8-9 glass, 10-11 door, 12 white, 13 gold, 14 grey, 15 dark
static void house_wall(void) {
    wipe(16, 16, 5);
    rect(0, 0, 16, 2, 15), rect(0, 2, 16, 1, 7), rect(0, 14, 16, 2, 7), rect(3, 7, 4, 1, 6), rect(10, 10, 4, 1, 6);
}

static void house_roof(void) {
    wipe(16, 16, 3);
    for (int y = 0; y < 16; y += 4) {
        rect(0, y, 16, 1, 2), rect(0, y + 3, 16, 1, 4);
        for (int x = y & 4; x < 16; x += 8) rect(x, y + 1, 1, 2, 4);
    }
}

static void house_door(void) {
    house_wall();
    rect(2, 1, 12, 15, 15), rect(3, 2, 10, 14, 10), rect(4, 3, 3, 5, 11), rect(9, 3, 3, 5, 11), rect(4, 10, 3, 5, 11);
    rect(9, 10, 3, 5, 11), dot(11, 9, 13);
}

static void houses(void) {
    house_roof();
    pack_metatile(M_ROOF);
    rect(0, 0, 1, 16, 15), rect(1, 0, 1, 16, 2);
    pack_metatile(M_ROOF_L);
    house_roof();
    rect(15, 0, 1, 16, 15), rect(14, 0, 1, 16, 4);
    pack_metatile(M_ROOF_R);
    house_wall();
    rect(0, 0, 1, 16, 15);
    pack_metatile(M_WALL_L);
    house_wall();
    rect(15, 0, 1, 16, 15);
    pack_metatile(M_WALL_R);
    house_wall();
    rect(2, 4, 12, 9, 15), rect(3, 5, 10, 7, 8), rect(3, 5, 5, 3, 9), rect(7, 5, 2, 7, 12), rect(3, 8, 10, 1, 12);
    pack_metatile(M_WINDOW);
    house_door();
    pack_metatile(M_DOOR);
    rect(1, 5, 14, 3, 14), rect(1, 10, 14, 3, 14), rect(1, 7, 14, 1, 15), rect(1, 12, 14, 1, 15);
    pack_metatile(M_LOCKED);
    house_door();
    rect(2, 1, 12, 3, 13), rect(3, 4, 10, 12, 12), rect(7, 4, 2, 12, 15), rect(5, 8, 1, 3, 13), rect(10, 8, 1, 3, 13);
    pack_metatile(M_GYM_DOOR);
}

// Inside: 1-2 floor, 3-5 wall, 6-8 wood, 9-10 carpet, 11 green, 12 white, 13 cyan, 14 yellow, 15 dark
static void boards(int seams) {
    wipe(16, 16, 1);
    rect(0, 15, 16, 1, 2), rect(15, 0, 1, 16, 2);
    if (seams & 1) rect(4, 4, 8, 8, 2), rect(5, 5, 6, 6, 1);
    if (seams & 2) rect(7, 2, 2, 12, 2), rect(2, 7, 12, 2, 2);
}

static void furniture(void) {
    for (int v = 0; v < 4; v++) boards(v), pack_metatile(M_FLOOR + v);
    wipe(16, 16, 9);
    rect(0, 0, 1, 16, 10), rect(15, 0, 1, 16, 10), rect(6, 6, 4, 4, 10);
    pack_metatile(M_CARPET);
    wipe(16, 16, 15);
    rect(1, 2, 14, 12, 9), rect(2, 3, 12, 10, 14), wedge(8, 11, 4, -6, 9);
    pack_metatile(M_MAT);
    wipe(16, 16, 4);
    rect(0, 0, 16, 4, 3), rect(0, 4, 16, 1, 15), rect(0, 9, 16, 1, 5), rect(4, 5, 1, 4, 5), rect(12, 10, 1, 5, 5);
    rect(0, 15, 16, 1, 15);
    pack_metatile(M_BRICK);
    wipe(16, 16, 15);
    rect(1, 0, 14, 15, 7), rect(2, 2, 12, 5, 8), rect(2, 9, 12, 5, 8);
    for (int i = 0; i < 6; i++) rect(2 + 2 * i, 3, 1, 4, 9 + i % 6), rect(3 + 2 * i, 10, 1, 4, 14 - i % 6);
    pack_metatile(M_SHELF);
    boards(0);
    rect(0, 3, 16, 13, 15), rect(1, 4, 14, 7, 6), rect(1, 11, 14, 4, 7), rect(3, 5, 6, 4, 12), rect(4, 6, 4, 1, 8);
    pack_metatile(M_DESK);
    boards(0);
    rect(1, 0, 14, 16, 15), rect(2, 1, 12, 14, 3), rect(3, 2, 10, 6, 15), rect(4, 3, 8, 4, 13), rect(4, 10, 2, 2, 9);
    rect(8, 10, 2, 2, 11), rect(4, 13, 8, 1, 5);
    pack_metatile(M_MACHINE);
    boards(0);
    rect(4, 10, 8, 6, 15), rect(5, 11, 6, 4, 7);
    oval(16, 11, 14, 11, 15), oval(15, 10, 12, 9, 11), oval(11, 7, 4, 3, 12);
    pack_metatile(M_PLANT);
    boards(0);
    rect(2, 11, 12, 5, 15), rect(3, 12, 10, 3, 4);
    oval(16, 12, 11, 12, 15), oval(16, 12, 9, 10, 3), oval(14, 9, 4, 4, 12), dot(6, 6, 15), dot(9, 6, 15),
        rect(6, 9, 4, 1, 15);
    pack_metatile(M_STATUE);
    wipe(16, 16, 15);
    rect(1, 0, 14, 15, 12), rect(1, 6, 14, 9, 9), rect(3, 1, 10, 4, 13);
    pack_metatile(M_BED2);
    wipe(16, 16, 15);
    pack_metatile(M_VOID);
}

// The battle scene: 1 sky, 2 sky low, 3 ground, 4 ground dark
static void scene(void) {
    wipe(16, 16, 1);
    rect(0, 14, 16, 2, 2);
    pack_metatile(M_SKY);
    wipe(16, 16, 3);
    rect(2, 4, 6, 1, 4), rect(9, 11, 6, 1, 4);
    pack_metatile(M_FIELD);
    wipe(16, 16, 4);
    pack_metatile(M_DARK);
}

// The upper layer: 1 paper, 2 ink, 3 frame ----------------------------------------------------------------------------
static void icon(int i) { pack(UI_TILES + (U_ICON + 4 * i) * 16, 16, 16); }

static void interface(void) {
    for (int i = 32; i < 91; i++) {
        for (int y = 0; y < 8; y++)
            for (int x = 0; x < 8; x++) dot(x, y, glyphs[i - 32][y] >> (7 - x) & 1 ? 2 : 1);
        pack(UI_TILES + i * 16, 8, 8);
    }
    wipe(8, 8, 0);
    pack(UI_TILES, 8, 8);
    for (int q = 0; q < 16; q++) { // quarter blocks for big letters
        wipe(8, 8, 1);
        for (int k = 0; k < 4; k++)
            if (q >> k & 1) rect(k % 2 * 4, k / 2 * 4, 4, 4, 2);
        pack(UI_TILES + (U_QUAD + q) * 16, 8, 8);
    }
    for (int f = 0; f < 9; f++) { // frame: rows of top, middle, bottom; left, middle, right in each
        wipe(8, 8, 1);
        int row = f / 3, column = f % 3;
        if (row != 1) rect(0, row ? 5 : 1, 8, 2, 3);
        if (column != 1) rect(column ? 5 : 1, 0, 2, 8, 3);
        if (row != 1) rect(0, row ? 7 : 0, 8, 1, 0); // see through beyond the frame
        if (column != 1) rect(column ? 7 : 0, 0, 1, 8, 0);
        pack(UI_TILES + (U_FRAME + f) * 16, 8, 8);
    }
    wipe(8, 8, 1); // more to come
    wedge(4, 6, 3, -4, 4);
    pack(UI_TILES + (U_FRAME + 9) * 16, 8, 8);
    wipe(8, 8, 1); // plain paper
    pack(UI_TILES + (U_FRAME + 10) * 16, 8, 8);
    for (int n = 0; n < 9; n++) // bar: n of 8 columns full, upper and lower half
        for (int low = 0; low < 2; low++) {
            wipe(8, 8, 2);
            rect(0, low ? 0 : 2, 8, 6, 3);
            if (n) rect(0, low ? 0 : 2, n, 6, 1);
            pack(UI_TILES + (U_BAR + 2 * n + low) * 16, 8, 8);
        }
    // icons: 1 ribbon, 2 white, 3 red, 4 yellow, 5 green, 6 blue, 7 brown, 8 slot, 15 dark
    wipe(16, 16, 1);
    rect(2, 2, 12, 12, 15), rect(3, 3, 10, 10, 8);
    icon(I_SLOT);
    wipe(16, 16, 1);
    rect(1, 1, 14, 14, 15), rect(2, 2, 12, 12, 5);
    oval(16, 18, 12, 11, 4), wedge(4, 2, 2, 5, 4), wedge(11, 2, 2, 5, 4), rect(5, 7, 2, 3, 15), rect(9, 7, 2, 3, 15);
    rect(7, 11, 2, 1, 15);
    icon(I_CREATURE);
    wipe(16, 16, 1);
    rect(1, 1, 14, 14, 15), rect(2, 2, 12, 12, 2), rect(4, 4, 8, 1, 15), rect(4, 6, 8, 1, 15), oval(20, 22, 6, 6, 3);
    icon(I_PERMIT);
    wipe(16, 16, 1);
    rect(1, 1, 14, 14, 15), rect(2, 2, 12, 12, 6), rect(2, 2, 2, 12, 3), rect(6, 4, 6, 3, 2), rect(12, 3, 1, 11, 2);
    icon(I_BOOK);
    wipe(16, 16, 1);
    rect(1, 1, 14, 14, 15), rect(2, 2, 12, 12, 2);
    wedge(8, 2, 5, 6, 5), wedge(8, 13, 5, -6, 5), wedge(8, 5, 2, 3, 4);
    icon(I_BADGE);
    wipe(16, 16, 1);
    oval(16, 16, 14, 14, 15), oval(16, 16, 12, 12, 4), rect(7, 4, 2, 8, 7);
    icon(I_COIN);
    wipe(16, 16, 1);
    rect(5, 1, 6, 5, 15), rect(6, 2, 4, 4, 2), oval(16, 20, 12, 11, 15), oval(16, 20, 10, 9, 3), rect(5, 7, 2, 3, 2);
    icon(I_POTION);
}

// People -------------------------------------------------------------------------------------------------------------
// h hair or cap, H its shade, s skin, c shirt, C its shade, y pack, Y its shade, p trousers, b shoes, k dark
static const char *const front[18] = {
    "....kkkkkkkk....", "..kkhhhhhhhhkk..", ".khhhhhhhhhhhhk.", ".khhhhhhhhhhhhk.", ".kHHHHHHHHHHHHk.",
    ".kHssssssssssHk.", ".kssksssssskssk.", ".kssksssssskssk.", "..kssssssssssk..", "...kksssssskk...",
    "..kcckkkkkkcck..", ".kcccccccccccck.", ".kcccccccccccck.", ".ksCccccccccCsk.", ".ksCccccccccCsk.",
    "..kCCCCCCCCCCk..", "..kppppppppppk..", "..kppppkkppppk..",
};
static const char *const back[18] = {
    "....kkkkkkkk....", "..kkhhhhhhhhkk..", ".khhhhhhhhhhhhk.", ".khhhhhhhhhhhhk.", ".khhhhhhhhhhhhk.",
    ".khhhhhhhhhhhhk.", ".khhhhhhhhhhhhk.", ".kHhhhhhhhhhhHk.", "..kHHHHHHHHHHk..", "...kkHHHHHHkk...",
    "..kcyyyyyyyyck..", ".kccyyyyyyyycck.", ".kccyyyyyyyycck.", ".kscYyyyyyyYcsk.", ".kscYYYYYYYYcsk.",
    "..kCCCCCCCCCCk..", "..kppppppppppk..", "..kppppkkppppk..",
};
static const char *const left[18] = {
    "....kkkkkkkk....", "..kkhhhhhhhhkk..", ".khhhhhhhhhhhhk.", ".khhhhhhhhhhhhk.", "kHHHHHHHHhhhhhk.",
    ".kssssssshhhhhk.", ".ksskssssshhhhk.", ".ksskssssshhhhk.", "..kssssssshhhk..", "...kksssssskk...",
    "...kccccckyyyk..", "..kcccccckyyyyk.", "..kccsscckyyyyk.", "..kccsscckyyyyk.", "..kccccccckYYk..",
    "..kCCCCCCCkkk...", "...kpppppppk....", "...kpppppppk....",
};
static const char *const legs[4][4] = {
    {"..kpppk..kpppk..", "..kpppk..kpppk..", "..kbbbk..kbbbk..", "...kkk....kkk..."},
    {"..kpppkkkpppk...", "..kpppk.kbbbk...", "..kbbbk..kkk....", "...kkk.........."},
    {"....kpppppk.....", "....kpppppk.....", "...kbbbbbbk.....", "....kkkkkk......"},
    {"...kpppkpppk....", "..kpppk.kpppk...", "..kbbk...kbbk...", "...kk.....kk...."},
};

static void letters(int y, const char *row) {
    static const char code[] = ".hHscCyYpbk";
    for (int x = 0; x < 16; x++) {
        int c = 0;
        while (code[c] != row[x]) c++;
        dot(x, y, c == 10 ? 15 : c);
    }
}

static void people(void) {
    const char *const *const bodies[3] = {front, back, left};
    for (int i = 0; i < 6; i++) { // front, back, left; standing and stepping
        wipe(16, 32, 0);
        for (int y = 0; y < 18; y++) letters(10 + y - (i & 1), bodies[i / 2][y]);
        for (int y = 0; y < 4; y++) letters(28 + y - (i & 1), legs[(i < 4 ? 0 : 2) + (i & 1)][y]);
        pack(OBJ_TILES + (S_PERSON + 8 * i) * 16, 16, 32);
    }
}

// Creatures: 1 light, 2 body, 3 shade, 4 belly, 5 extra, 6 white, 15 dark ---------------------------------------------
static void eye(int x, int y) {
    rect(x, y, 5, 7, 6), rect(x + 1, y + 2, 3, 5, 15), dot(x + 1, y + 2, 6);
}

static void creatures(void) {
    wipe(32, 32, 0); // starter, from the front
    wedge(7, 2, 4, 9, 3), wedge(24, 2, 4, 9, 3), oval(32, 50, 20, 13, 3), oval(32, 24, 25, 20, 2),
        oval(27, 18, 12, 8, 1);
    oval(32, 52, 11, 8, 4), rect(9, 10, 4, 5, 15), rect(19, 10, 4, 5, 15), dot(10, 11, 6), dot(20, 11, 6),
        rect(14, 16, 4, 2, 15);
    outline(32, 32, 15);
    pack(OBJ_TILES + S_STARTER * 16, 32, 32);

    wipe(64, 64, 0); // leaf: a round bush with three leaves on its head
    oval(64, 30, 12, 28, 5), oval(36, 38, 26, 12, 5), oval(92, 38, 26, 12, 5), oval(64, 84, 52, 40, 3);
    oval(60, 80, 46, 34, 2), oval(44, 66, 16, 9, 1), oval(64, 102, 26, 16, 4), eye(20, 34), eye(38, 34);
    rect(28, 46, 8, 2, 15), oval(36, 122, 14, 6, 3), oval(92, 122, 14, 6, 3);
    outline(64, 64, 15);
    pack(OBJ_TILES + S_LEAF * 16, 64, 64);

    wipe(64, 64, 0); // tide: a drop with fins
    wedge(32, 2, 14, 26, 2), oval(14, 84, 12, 24, 5), oval(114, 84, 12, 24, 5), oval(64, 80, 44, 42, 3);
    oval(62, 76, 40, 37, 2), oval(46, 58, 12, 14, 1), oval(64, 100, 24, 16, 4), eye(20, 32), eye(38, 32);
    oval(64, 92, 8, 6, 15), oval(64, 121, 34, 6, 5);
    outline(64, 64, 15);
    pack(OBJ_TILES + S_TIDE * 16, 64, 64);

    wipe(64, 64, 0); // our own, from behind
    wedge(14, 4, 8, 20, 3), wedge(48, 4, 8, 20, 3), oval(64, 104, 46, 32, 3), oval(64, 58, 50, 44, 2),
        oval(54, 44, 26, 16, 1);
    oval(64, 106, 34, 24, 2), oval(104, 100, 16, 10, 5), oval(112, 92, 10, 10, 4);
    outline(64, 64, 15);
    pack(OBJ_TILES + S_HERO * 16, 64, 64);
}

// Colours ------------------------------------------------------------------------------------------------------------
static void colours(volatile u16 *to, const u16 *from) {
    for (int i = 0; i < 16; i++) to[i] = from[i];
}

#define DARK RGB(3, 3, 5)
#define WHITE RGB(31, 31, 31)

static const u16 house[16] = {
    0, RGB(16, 24, 10), RGB(29, 12, 9), RGB(24, 7, 6), RGB(17, 4, 4), RGB(30, 28, 23), RGB(26, 23, 17), RGB(20, 17, 12),
    RGB(10, 18, 28), RGB(19, 27, 31), RGB(15, 8, 3), RGB(20, 12, 5), WHITE, RGB(30, 25, 6), RGB(19, 19, 20), DARK,
};
static const u16 terrain_colours[16] = {
    0, 0, 0, 0, 0, 0, 0, RGB(14, 8, 4), 0, 0, RGB(15, 24, 31), RGB(7, 15, 28), WHITE, RGB(29, 6, 7), RGB(31, 27, 6),
        DARK,
};
static const u16 inside_colours[16] = {
    0, 0, 0, RGB(27, 25, 23), RGB(20, 17, 16), RGB(14, 11, 11), RGB(27, 19, 10), RGB(21, 13, 6), RGB(13, 7, 3), 0, 0,
    RGB(7, 22, 7), WHITE, RGB(12, 28, 29), RGB(31, 27, 7), DARK,
};
static const u16 scene_colours[2][16] = {
    {0, RGB(22, 28, 31), RGB(27, 30, 31), RGB(24, 27, 16), RGB(17, 21, 11)}, // in the wild
    {0, RGB(20, 6, 14), RGB(26, 10, 12), RGB(30, 18, 8), RGB(23, 11, 4)},    // against a person
};
static const u16 text_colours[8][16] = {
    {0, RGB(4, 26, 5), DARK, RGB(10, 10, 11)},                                              // P_GREEN, bars
    {0, RGB(31, 27, 3), DARK, RGB(10, 10, 11)},                                             // P_YELLOW
    {0, RGB(31, 4, 4), DARK, RGB(10, 10, 11)},                                              // P_RED
    {0, RGB(4, 6, 24), WHITE, RGB(31, 29, 8), RGB(31, 29, 8)},                              // P_PICK
    {0, 0, WHITE, DARK},                                                                    // P_RIBBON
    {0, 0, WHITE, RGB(30, 5, 5), RGB(31, 27, 3), RGB(4, 27, 8), RGB(6, 12, 30), RGB(19, 11, 3), RGB(9, 9, 12), // P_ICON
     [15] = RGB(2, 2, 4)},
    {0, RGB(25, 3, 5), WHITE, RGB(31, 29, 8), RGB(31, 29, 8)},                              // P_LIT
    {0, RGB(30, 30, 29), DARK, RGB(11, 12, 19), RGB(29, 5, 5)},                             // P_TEXT
};

// The people's colours: hat, hat shade, skin, shirt, shirt shade, pack, pack shade, trousers, shoes
#define LOOK(h, hs, c, cs, y, ys, p)                                                                                   \
    { 0, h, hs, RGB(31, 24, 18), c, cs, y, ys, p, RGB(7, 4, 3), 0, 0, 0, 0, 0, DARK }
static const u16 looks[9][16] = {
    LOOK(RGB(31, 4, 4), RGB(20, 1, 2), RGB(6, 12, 29), RGB(3, 7, 19), RGB(31, 29, 2), RGB(25, 19, 0), RGB(9, 9, 15)),
    LOOK(RGB(22, 22, 23), RGB(15, 15, 17), WHITE, RGB(23, 24, 26), WHITE, RGB(23, 24, 26), RGB(12, 9, 7)),
    LOOK(RGB(4, 6, 15), RGB(2, 3, 9), RGB(8, 10, 21), RGB(5, 6, 14), RGB(8, 10, 21), RGB(5, 6, 14), RGB(4, 4, 9)),
    LOOK(RGB(15, 8, 3), RGB(9, 5, 2), RGB(5, 25, 13), RGB(2, 16, 8), RGB(5, 25, 13), RGB(2, 16, 8), RGB(28, 28, 28)),
    LOOK(RGB(25, 20, 6), RGB(17, 13, 3), RGB(23, 6, 26), RGB(14, 3, 17), RGB(23, 6, 26), RGB(14, 3, 17), RGB(8, 4, 10)),
    LOOK(RGB(2, 2, 3), RGB(1, 1, 2), RGB(7, 7, 8), RGB(4, 4, 5), RGB(28, 4, 4), RGB(18, 2, 2), RGB(5, 5, 6)),
    LOOK(RGB(30, 15, 3), RGB(21, 9, 1), RGB(16, 4, 6), RGB(10, 2, 3), RGB(16, 4, 6), RGB(10, 2, 3), RGB(27, 25, 20)),
    LOOK(RGB(24, 12, 6), RGB(16, 7, 3), RGB(30, 17, 20), RGB(21, 10, 13), RGB(30, 17, 20), RGB(21, 10, 13),
     RGB(13, 15, 24)),
    LOOK(RGB(8, 5, 4), RGB(5, 3, 2), RGB(13, 24, 26), RGB(8, 15, 17), RGB(13, 24, 26), RGB(8, 15, 17), RGB(14, 10, 6)),
};
#define BEAST(light, body, shade, belly, extra)                                                                        \
    { 0, light, body, shade, belly, extra, WHITE, 0, 0, 0, 0, 0, 0, 0, 0, DARK }
static const u16 beasts[5][16] = {
    BEAST(RGB(31, 20, 13), RGB(30, 11, 5), RGB(20, 6, 3), RGB(31, 27, 18), RGB(31, 24, 4)),
    BEAST(RGB(31, 31, 18), RGB(30, 27, 5), RGB(22, 18, 2), WHITE, RGB(28, 12, 4)),
    BEAST(RGB(27, 19, 31), RGB(18, 9, 27), RGB(11, 5, 18), RGB(29, 25, 31), RGB(29, 9, 20)),
    BEAST(RGB(19, 31, 14), RGB(7, 25, 5), RGB(3, 16, 4), RGB(28, 30, 17), RGB(2, 20, 3)),
    BEAST(RGB(20, 28, 31), RGB(5, 14, 31), RGB(3, 8, 22), RGB(27, 30, 31), RGB(3, 22, 29)),
};

void gfx_scene(int trainer) { colours(BG_PALETTE + P_SCENE * 16, scene_colours[trainer]); }

void gfx_theme(const Theme *t) {
    volatile u16 *p = BG_PALETTE;
    for (int i = 0; i < 3; i++) {
        p[1 + i] = t->ground[i];
        p[4 + i] = t->tree[i];
        p[P_HOUSE_A * 16 + 2 + i] = t->roof_a[i];
        p[P_HOUSE_B * 16 + 2 + i] = t->roof_b[i];
    }
    for (int i = 0; i < 2; i++) {
        p[8 + i] = t->path[i];
        p[P_INSIDE * 16 + 1 + i] = t->floor[i];
        p[P_INSIDE * 16 + 9 + i] = t->carpet[i];
    }
    p[P_RIBBON * 16 + 1] = p[P_ICON * 16 + 1] = t->ribbon;
}

void gfx_init(void) {
    terrain(), houses(), furniture(), scene(), interface(), people(), creatures();
    colours(BG_PALETTE, terrain_colours);
    colours(BG_PALETTE + P_HOUSE_A * 16, house);
    colours(BG_PALETTE + P_HOUSE_B * 16, house);
    colours(BG_PALETTE + P_INSIDE * 16, inside_colours);
    for (int i = 0; i < 8; i++) colours(BG_PALETTE + (P_GREEN + i) * 16, text_colours[i]);
    for (int i = 0; i < 9; i++) colours(OBJ_PALETTE + i * 16, looks[i]);
    for (int i = 0; i < 5; i++) colours(OBJ_PALETTE + (9 + i) * 16, beasts[i]);
}
