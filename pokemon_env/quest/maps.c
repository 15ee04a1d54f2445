// The eight maps: cells as letters, people, warps, connections and colours.
#include "quest.h"

/* Outdoors:  . ground   , path   " tall grass   T tree   ~ water   # fence   * flowers   o rock   R cliff   s sign
              B table with the bag   X gate   ( ^ ) [ w D L house A   { - } < k d l house B   G gym door
   Indoors:   _ floor   = carpet   m way out   H wall   K shelf   t desk   M machine   P plant   S statue   b bed,
              and a space for what lies outside the walls */
static const char *const home[] = {
    "TTTTTTTTT,,TTTTTTTTT",
    "TTTT.....,,.....TTTT",
    "T........,,........T",
    "T.(^^)...,,.{---}..T",
    "T.(^^)...,,.{---}..T",
    "T.[Dw]...,,.<kdk>..T",
    "T..,....s,,...,.s..T",
    "T..,,,,,,,,,,,,.*..T",
    "T.....*..,,....**..T",
    "T.####...,,..####..T",
    "T.*..#...,,..#..*..T",
    "T.*......,,........T",
    "T..~~~...,,...oT...T",
    "T.~~~~~.......TT...T",
    "T.~~~~~...**.......T",
    "TTTTTTTTTTTTTTTTTTTT",
};
static const char *const route[] = {
    "TTTTTTT,,TTTTTTT",
    "TTTTTT.,,.TTTTTT",
    "TTTTTTT,TTTTTTTT",
    "TTT...,,,...TTTT",
    "TT.*...,...*.TTT",
    "TT\"\"\"\"\"\"\"\"\"\"\"\"TT",
    "TT\"\"\"\"\"\"\"\"\"\"\"\"TT",
    "T.....,,.......T",
    "T...B,,..~~~~..T",
    "T....,,.~~~~~~.T",
    "T.*..,,..~~~~..T",
    "T.oo..,,.......T",
    "TT\"\"\"\"\"\"\"\"\"\"\"oTT",
    "TTo\"\"\"\"\"\"\"\"\"\"\"TT",
    "TTT\"\"\"\"\"\"\"\"\"\"TTT",
    "TTT..*.,,.*..TTT",
    "TTTT.s.,,...TTTT",
    "TTTTTTT,,TTTTTTT",
};
static const char *const town[] = {
    "TTTTTTTTTTTTTTTTTT",
    "TTTT.(^^)..{---}.T",
    "TTTT.(^^)..{---}.T",
    "TTTT.[wL]..<klk>.T",
    "TTTT..,......,...T",
    "TTT...,,,,,,,,,..T",
    ",,X,,,,,*,*....,.T",
    "TTT#..,.,,...*,,.T",
    "TTT#..*.,,..~~~..T",
    "TTT#....,,.~~~~~.T",
    "TTT#.*.s,,.~~~~~.T",
    "TTTT....,,..~~~..T",
    "TTTTTT..,,..TTTTTT",
    "TTTTTTTT,,TTTTTTTT",
};
static const char *const woods[] = {
    "TTTTTTT,,TTTTTTT",
    "TTTTTT...TTTTTTT",
    "TTTTTTT.TTTTTTTT",
    "TT......T......T",
    "TT.TTTTTT.TTTT.T",
    "TT.....\"\"\"\"T...T",
    "TTTTTT.\"\"\"\"T.TTT",
    "T......TTTTT...T",
    "T.TTTTTT.....T.T",
    "T.T......TTTTT.T",
    "T.T.TTTTTT.....T",
    "T...T..\"\"\".TTTTT",
    "TTTTT.T.\"\"......",
    "T.....T.TTTTTTTT",
    "T.TTTTT........T",
    "TTTTTTTTTTTTTTTT",
};
static const char *const city[] = {
    "RRRRRRRRRRRRRRRRRR",
    "R.(^^)..{-----}..R",
    "R.(^^)..{-----}..R",
    "R.[wL]..<kkGkk>..R",
    "R...,....s.,.....R",
    "R..,,,,,,,,,,,,..R",
    "R.*...,.....*.,..R",
    "R.###.,.(^^)..,..R",
    "R.*.*.,.(^^)..,..R",
    "R.###.,.[Lw]..,..R",
    "R....,,,,,,,,,,..R",
    "R..~~~..,,...oo..R",
    "RR.~~~..,,......RR",
    "RRRRRRRR,,RRRRRRRR",
};
static const char *const gym[] = {
    "HHHHHHHHHH",
    "H___==___H",
    "H_S_==_S_H",
    "H___==___H",
    "HSS_==_SSH",
    "H___==___H",
    "H_S_==_S_H",
    "H___==___H",
    "HHHHmmHHHH",
};
static const char *const lab[] = {
    "HHHHHHHHHH",
    "HKKKHHMMKH",
    "H________H",
    "H_tt_____H",
    "H_tt___t_H",
    "H________H",
    "HPK____KPH",
    "H________H",
    "HHHHmmHHHH",
};
static const char *const house[] = {
    "HHHHHHHH",
    "HKKHHbPH",
    "H______H",
    "H__tt__H",
    "H__tt__H",
    "HP____PH",
    "HHHmmHHH",
};

static const u8 script = 2; // the reader only looks at the pointer

#define STANDS(id, look, x, y, flag) \
    { id, look, 0, 0, x, y, 3, 1, 0, 0, 0, &script, flag, 0 }
#define WANDERS(id, look, x, y) \
    { id, look, 0, 0, x, y, 3, 2, 0x12, 0, 0, &script, 0, 0 }
static const Person home_people[] = {WANDERS(1, 7, 5, 8), WANDERS(2, 8, 16, 11)};
static const Person route_people[] = {STANDS(1, 2, 7, 2, FLAG_PERMIT)};
static const Person town_people[] = {STANDS(1, 3, 12, 6, 0), STANDS(2, 4, 3, 5, 0), WANDERS(3, 7, 6, 9)};
static const Person woods_people[] = {STANDS(1, 5, 7, 2, FLAG_TRAINER)};
static const Person city_people[] = {WANDERS(1, 8, 3, 6), WANDERS(2, 7, 12, 10)};
static const Person gym_people[] = {STANDS(1, 6, 4, 2, 0)};
static const Person lab_people[] = {STANDS(1, 1, 5, 3, 0)};
static const Person house_people[] = {STANDS(1, 7, 2, 3, 0)};

#define WARP(x, y, id, group, map) \
    { x, y, 0, id, map, group }
static const Warp home_warps[] = {WARP(3, 5, 0, 1, 0), WARP(14, 5, 0, 1, 4)};
static const Warp city_warps[] = {WARP(11, 3, 0, 11, 3)};
static const Warp gym_warps[] = {WARP(4, 8, 0, 0, 3), WARP(5, 8, 0, 0, 3)};
static const Warp lab_warps[] = {WARP(4, 8, 1, 0, 9), WARP(5, 8, 1, 0, 9)};
static const Warp house_warps[] = {WARP(3, 6, 0, 0, 9), WARP(4, 6, 0, 0, 9)};

#define WAY(direction, offset, group, map) \
    { direction, {0, 0, 0}, offset, group, map, {0, 0} }
static const Connection home_ways[] = {WAY(NORTH, 2, 0, 16)};
static const Connection route_ways[] = {WAY(SOUTH, -2, 0, 9), WAY(NORTH, -1, 0, 10)};
static const Connection town_ways[] = {WAY(SOUTH, 1, 0, 16), WAY(WEST, -6, 24, 11)};
static const Connection woods_ways[] = {WAY(EAST, 6, 0, 10), WAY(NORTH, -1, 0, 3)};
static const Connection city_ways[] = {WAY(SOUTH, 1, 24, 11)};

#define LEN(a) (sizeof(a) / sizeof(*a))
#define PEOPLE(p) .events.people = LEN(p), .events.person = p
#define WARPS(w) .events.warps = LEN(w), .events.warp = w
#define WAYS(c) .connections = {LEN(c), c}
#define CELLS(w, rows_) .layout = {w, LEN(rows_), &script, rows_}, .rows = rows_
#define GREEN_TREE {RGB(12, 25, 8), RGB(6, 19, 6), RGB(3, 12, 4)}

const Map maps[MAPS] = {
    [HOME] = {
        CELLS(20, home), PEOPLE(home_people), WARPS(home_warps), WAYS(home_ways), .group = 0, .number = 9,
        .border = 'T',
        .theme = {
            .ground = {RGB(17, 28, 11), RGB(13, 24, 9), RGB(8, 18, 6)}, .tree = GREEN_TREE,
            .path = {RGB(30, 26, 17), RGB(25, 20, 12)}, .roof_a = {RGB(30, 14, 10), RGB(26, 8, 6), RGB(17, 4, 4)},
            .roof_b = {RGB(14, 19, 31), RGB(8, 13, 28), RGB(4, 7, 19)}, .ribbon = RGB(4, 10, 20),
        },
    },
    [ROUTE] = {
        CELLS(16, route), PEOPLE(route_people), WAYS(route_ways), .group = 0, .number = 16, .border = 'T',
        .theme = {
            .ground = {RGB(25, 28, 10), RGB(20, 24, 7), RGB(13, 18, 4)},
            .tree = {RGB(17, 24, 5), RGB(10, 18, 4), RGB(5, 11, 3)}, .path = {RGB(27, 20, 12), RGB(21, 15, 8)},
            .roof_a = {RGB(30, 14, 10), RGB(26, 8, 6), RGB(17, 4, 4)},
            .roof_b = {RGB(14, 19, 31), RGB(8, 13, 28), RGB(4, 7, 19)}, .ribbon = RGB(17, 11, 2),
        },
    },
    [TOWN] = {
        CELLS(18, town), PEOPLE(town_people), WAYS(town_ways), .group = 0, .number = 10, .border = 'T',
        .theme = {
            .ground = {RGB(15, 27, 20), RGB(11, 23, 16), RGB(7, 17, 12)},
            .tree = {RGB(31, 21, 8), RGB(26, 13, 5), RGB(15, 7, 4)}, .path = {RGB(31, 29, 26), RGB(25, 22, 19)},
            .roof_a = {RGB(31, 22, 6), RGB(27, 16, 3), RGB(18, 9, 2)},
            .roof_b = {RGB(24, 13, 28), RGB(18, 8, 22), RGB(11, 4, 14)}, .ribbon = RGB(20, 6, 5),
        },
    },
    [WOODS] = {
        CELLS(16, woods), PEOPLE(woods_people), WAYS(woods_ways), .group = 24, .number = 11, .border = 'T',
        .theme = {
            .ground = {RGB(12, 18, 14), RGB(9, 14, 11), RGB(6, 10, 8)},
            .tree = {RGB(5, 15, 11), RGB(3, 10, 8), RGB(1, 5, 5)}, .path = {RGB(17, 17, 13), RGB(13, 13, 10)},
            .roof_a = {RGB(22, 16, 6), RGB(18, 11, 3), RGB(12, 6, 2)},
            .roof_b = {RGB(16, 9, 19), RGB(12, 6, 15), RGB(7, 3, 9)}, .ribbon = RGB(1, 8, 5),
        },
    },
    [CITY] = {
        CELLS(18, city), PEOPLE(city_people), WARPS(city_warps), WAYS(city_ways), .group = 0, .number = 3,
        .border = 'R',
        .theme = {
            .ground = {RGB(23, 23, 25), RGB(20, 20, 22), RGB(14, 14, 17)},
            .tree = {RGB(24, 21, 18), RGB(17, 14, 12), RGB(10, 8, 8)}, .path = {RGB(29, 26, 22), RGB(24, 21, 18)},
            .roof_a = {RGB(12, 25, 25), RGB(6, 19, 20), RGB(3, 12, 13)},
            .roof_b = {RGB(31, 20, 8), RGB(28, 13, 4), RGB(19, 7, 2)}, .ribbon = RGB(10, 10, 13),
        },
    },
    [GYM] = {
        CELLS(10, gym), PEOPLE(gym_people), WARPS(gym_warps), .group = 11, .number = 3, .inside = 1, .border = ' ',
        .theme = {
            .floor = {RGB(22, 19, 15), RGB(17, 14, 11)}, .carpet = {RGB(28, 9, 3), RGB(20, 5, 2)},
            .ribbon = RGB(21, 3, 9),
        },
    },
    [LAB] = {
        CELLS(10, lab), PEOPLE(lab_people), WARPS(lab_warps), .group = 1, .number = 4, .inside = 1, .border = ' ',
        .theme = {
            .floor = {RGB(21, 26, 30), RGB(16, 21, 26)}, .carpet = {RGB(8, 14, 28), RGB(5, 9, 20)},
            .ribbon = RGB(2, 15, 17),
        },
    },
    [HOUSE] = {
        CELLS(8, house), PEOPLE(house_people), WARPS(house_warps), .group = 1, .number = 0, .inside = 1,
        .border = ' ',
        .theme = {
            .floor = {RGB(30, 22, 13), RGB(24, 16, 8)}, .carpet = {RGB(29, 10, 12), RGB(20, 5, 7)},
            .ribbon = RGB(15, 7, 2),
        },
    },
};

int find_map(int group, int number) {
    int i = 0;
    while (maps[i].group != group || maps[i].number != number) i++;
    return i;
}

// The letter of a cell; cells beyond an edge come from the map joined there, or are the border.
int cell_char(int map, int x, int y) {
    const Map *m = &maps[map];
    if (x >= 0 && y >= 0 && x < m->layout.width && y < m->layout.height) return m->rows[y][x];
    for (u32 i = 0; i < m->connections.count; i++) {
        const Connection *c = &m->connections.connection[i];
        const Map *next = &maps[find_map(c->group, c->map)];
        int u = x, v = y;
        if (c->direction == NORTH) v += next->layout.height, u -= c->offset;
        if (c->direction == SOUTH) v -= m->layout.height, u -= c->offset;
        if (c->direction == WEST) u += next->layout.width, v -= c->offset;
        if (c->direction == EAST) u -= m->layout.width, v -= c->offset;
        if (u >= 0 && v >= 0 && u < next->layout.width && v < next->layout.height) return next->rows[v][u];
    }
    return m->border;
}

static const struct {
    char cell;
    u8 metatile, palette, blocked;
} legend[] = {
    {'.', M_GRASS, P_TERRAIN, 0},     {',', M_PATH, P_TERRAIN, 0},      {'"', M_TALL, P_TERRAIN, 0},
    {'T', M_TREE, P_TERRAIN, 1},      {'~', M_WATER, P_TERRAIN, 1},     {'#', M_FENCE, P_TERRAIN, 1},
    {'*', M_BED, P_TERRAIN, 0},       {'o', M_ROCK, P_TERRAIN, 1},      {'R', M_CLIFF, P_TERRAIN, 1},
    {'s', M_SIGN, P_TERRAIN, 1},      {'B', M_TABLE_BAG, P_TERRAIN, 1}, {'X', M_GATE, P_TERRAIN, 1},
    {'(', M_ROOF_L, P_HOUSE_A, 1},    {'^', M_ROOF, P_HOUSE_A, 1},      {')', M_ROOF_R, P_HOUSE_A, 1},
    {'[', M_WALL_L, P_HOUSE_A, 1},    {']', M_WALL_R, P_HOUSE_A, 1},    {'w', M_WINDOW, P_HOUSE_A, 1},
    {'D', M_DOOR, P_HOUSE_A, 0},      {'L', M_LOCKED, P_HOUSE_A, 1},    {'{', M_ROOF_L, P_HOUSE_B, 1},
    {'-', M_ROOF, P_HOUSE_B, 1},      {'}', M_ROOF_R, P_HOUSE_B, 1},    {'<', M_WALL_L, P_HOUSE_B, 1},
    {'>', M_WALL_R, P_HOUSE_B, 1},    {'k', M_WINDOW, P_HOUSE_B, 1},    {'d', M_DOOR, P_HOUSE_B, 0},
    {'l', M_LOCKED, P_HOUSE_B, 1},    {'G', M_GYM_DOOR, P_HOUSE_B, 0},  {'_', M_FLOOR, P_INSIDE, 0},
    {'=', M_CARPET, P_INSIDE, 0},     {'m', M_MAT, P_INSIDE, 0},        {'H', M_BRICK, P_INSIDE, 1},
    {'K', M_SHELF, P_INSIDE, 1},      {'t', M_DESK, P_INSIDE, 1},       {'M', M_MACHINE, P_INSIDE, 1},
    {'P', M_PLANT, P_INSIDE, 1},      {'S', M_STATUE, P_INSIDE, 1},     {'b', M_BED2, P_INSIDE, 1},
    {' ', M_VOID, P_INSIDE, 1},
};

// The tile in bits 0-7 and its palette in bits 8-9: what the grid in memory holds below its collision bits.
int metatile_at(int map, int x, int y, int *blocked) {
    int c = cell_char(map, x, y);
    u32 i = 0, tile;
    while (legend[i].cell != c) i++;
    tile = legend[i].metatile;
    *blocked = legend[i].blocked;
    u32 hash = ((u32)x * 40503u + (u32)y) * 0x9E3779B1u + (u32)map;
    hash = (hash ^ hash >> 16) * 0x7FEB352Du;
    hash = (hash ^ hash >> 15) * 0x846CA68Bu >> 20;
    if (tile == M_GRASS) tile += hash & 7;
    if (tile == M_PATH) tile += hash & 3;
    if (tile == M_FLOOR) tile += hash & 3;
    if (tile == M_TREE && hash % 3 == 0) tile = M_PINE;
    if (tile == M_TABLE_BAG && flag(FLAG_CREATURE)) tile = M_TABLE;
    if (tile == M_GATE && flag(FLAG_GATE)) tile = M_GATE_OPEN, *blocked = 0;
    return tile | legend[i].palette << 8;
}
