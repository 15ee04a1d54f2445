// The field: the map on the screen, the player's steps, the people, the ribbon.
#include "quest.h"

int here; // index of the map one is on
static u8 walk, turn, dirty;
static s8 shift_x[16], shift_y[16]; // pixels that an object is still away from its cell
static u16 timer[16];
static u8 stepping[16];
static const s8 step_x[5] = {0, 0, 0, -1, 1}, step_y[5] = {0, 1, -1, 0, 0};

static Object *player(void) { return &OBJECTS[PLAYER_INDEX]; }

static u16 grid_at(int x, int y) { // of a cell of the map, margins included
    const Layout *l = &maps[here].layout;
    int blocked;
    if (x >= -7 && y >= -7 && x < l->width + 8 && y < l->height + 7) return GRID[(y + 7) * (l->width + 15) + x + 7];
    int tile = metatile_at(here, x, y, &blocked);
    return tile | blocked << 10;
}

static void draw_cell(int x, int y) {
    u32 cell = grid_at(x, y), entry = (cell & 255) * 4 | (cell >> 8 & 3) << 12;
    volatile u16 *to = MAP_SCREEN + (y & 15) * 64 + (x & 15) * 2;
    to[0] = entry, to[1] = entry + 1, to[32] = entry + 2, to[33] = entry + 3;
}

static void draw_row(int y, int x) {
    for (int i = -8; i < 8; i++) draw_cell(x + i, y);
}

static void draw_column(int x, int y) {
    for (int i = -6; i <= 6; i++) draw_cell(x, y + i);
}

static void fill_grid(void) {
    const Layout *l = &maps[here].layout;
    u16 *to = GRID;
    for (int y = -7; y < l->height + 7; y++)
        for (int x = -7; x < l->width + 8; x++) {
            int blocked, tile = metatile_at(here, x, y, &blocked);
            *to++ = tile | blocked << 10 | 3 << 12;
        }
}

// Fills the map header, the grid with its margins and the people for map `map`.
static void load(int map) {
    const Map *m = &maps[map];
    int w = m->layout.width + 15, h = m->layout.height + 14;
    here = map;
    MAP_HEADER[0] = (u32)&m->layout;
    MAP_HEADER[1] = (u32)&m->events;
    MAP_HEADER[2] = (u32)m->rows;
    MAP_HEADER[3] = m->connections.count ? (u32)&m->connections : 0;
    GRID_HEADER[0] = w, GRID_HEADER[1] = h, GRID_HEADER[2] = (u32)GRID;
    fill_grid();
    WARP_GROUP = m->group, WARP_NUMBER = m->number;
    if (SAVE1_POINTER) AT8(SAVE1_POINTER + 4) = m->group, AT8(SAVE1_POINTER + 5) = m->number;
    memset(OBJECTS + 1, 0, 15 * sizeof(Object));
    for (int i = 0; i < m->events.people; i++) {
        const Person *p = &m->events.person[i];
        Object *o = &OBJECTS[1 + i];
        if (p->flag && flag(p->flag)) continue;
        o->active = 1, o->look = p->look, o->movement = p->movement, o->local = p->local;
        o->map = m->number, o->group = m->group, o->elevation = p->elevation, o->range = p->range;
        o->home_x = o->x = o->old_x = p->x + 7, o->home_y = o->y = o->old_y = p->y + 7;
        o->facing = 0x11;
        shift_x[1 + i] = shift_y[1 + i] = 0;
        timer[1 + i] = 30 + random(300);
    }
}

static void redraw(void) {
    int x = player()->x - 7, y = player()->y - 7;
    gfx_theme(&maps[here].theme);
    for (int i = -6; i <= 6; i++) draw_row(y + i, x);
    if (walk) draw_column(x - 8 * step_x[player()->facing & 15], y);
    dirty = 1;
}

static void scroll(void) {
    Object *p = player();
    REG_BG1HOFS = ((p->x - 7) * 16 + shift_x[PLAYER_INDEX] - 112) & 511;
    REG_BG1VOFS = ((p->y - 7) * 16 + shift_y[PLAYER_INDEX] - 72) & 511;
}

// People as sprites, those further down in front.
void sprites(void) {
    Object *me = player();
    int left = me->x * 16 + shift_x[PLAYER_INDEX] - 112, top = me->y * 16 + shift_y[PLAYER_INDEX] - 72;
    sprites_clear();
    for (int y = 7; y >= -6; y--)
        for (int i = 0; i < 16; i++) {
            Object *o = &OBJECTS[i];
            if (!(o->active & 1) || o->y != me->y + y) continue;
            int sx = o->x * 16 + shift_x[i] - left, sy = o->y * 16 + shift_y[i] - top - 16;
            if (sx < -16 || sx > 240 || sy < -32 || sy > 160) continue;
            int facing = o->facing & 15, body = facing == SOUTH ? 0 : facing == NORTH ? 2 : 4;
            int away = shift_x[i] + shift_y[i], foot = (away < 0 ? -away : away) >> 2;
            int step = foot == 2 || foot == 3 || foot == 1;
            sprite(sx, sy, S_PERSON + 8 * (body + step), o->look, 2, 2,
                   facing == EAST || (body < 4 && step && stepping[i]));
        }
}

void hud(void) {
    static const struct { u16 flag; u8 icon; } slots[4] = {
        {FLAG_CREATURE, I_CREATURE}, {FLAG_PERMIT, I_PERMIT}, {FLAG_BOOK, I_BOOK}, {FLAG_BADGE, I_BADGE}};
    fill(0, 0, 30, 2, P_RIBBON);
    for (int i = 0; i < 4; i++) {
        int tile = U_ICON + 4 * (flag(slots[i].flag) ? slots[i].icon : I_SLOT);
        for (int k = 0; k < 4; k++) put(3 * i + (k & 1), k >> 1, tile + k, P_ICON);
    }
    if (PARTY_COUNT) bar(12, 0, 10, PARTY[0].hp, PARTY[0].max_hp);
    for (u32 i = 0; i < money() / 500 && i < 2; i++)
        for (int k = 0; k < 4; k++) put(23 + 2 * i + (k & 1), k >> 1, U_ICON + 4 * I_COIN + k, P_ICON);
    if (potions()) {
        for (int k = 0; k < 4; k++) put(27 + (k & 1), k >> 1, U_ICON + 4 * I_POTION + k, P_ICON);
        print_number(29, 1, potions(), P_RIBBON);
    }
}

// Shows map `map` around a cell without people, for the title screen.
void field_view(int map, int x, int y) {
    PLAYER_INDEX = 0;
    load(map);
    player()->x = x + 7, player()->y = y + 7;
    walk = 0;
    redraw();
    scroll();
}

void field_show(void) {
    clear(0, 0, 30, 20);
    redraw();
    hud();
    scroll();
    sprites();
}

// After a flag has changed a cell of this map: fills the grid again, people stay where they are.
void field_refresh(void) {
    fill_grid();
    field_show();
}

static void place(int x, int y) {
    Object *p = player();
    p->old_x = p->x, p->old_y = p->y;
    p->x = x + 7, p->y = y + 7;
    AT16(SAVE1_POINTER) = x, AT16(SAVE1_POINTER + 2) = y;
}

void field_enter(int map, int x, int y, int facing) {
    Object *p;
    LOCKED = 1;
    PLAYER_INDEX = 0;
    walk = turn = 0;
    load(map);
    p = player();
    p->active = 1, p->look = 0, p->local = 0xFF, p->map = maps[map].number, p->group = maps[map].group,
        p->elevation = 3;
    p->facing = facing * 0x11;
    shift_x[0] = shift_y[0] = 0;
    place(x, y);
    if (map == TOWN) set_flag(FLAG_TOWN);
    if (map == CITY) set_flag(FLAG_CITY);
    frame();
    field_show();
    LOCKED = 0;
}

static int someone_at(int x, int y) { // the object on a cell, the player too, or -1
    for (int i = 0; i < 16; i++)
        if ((OBJECTS[i].active & 1) && OBJECTS[i].x == x + 7 && OBJECTS[i].y == y + 7) return i;
    return -1;
}

static int blocked(int x, int y) { return (grid_at(x, y) >> 10 & 3) || someone_at(x, y) >= 0; }

// The connected map that the cell (x, y) beyond the edge lies on, or 0; moves x and y into it.
static const Map *across(int *x, int *y) {
    const Map *m = &maps[here];
    int direction = *y < 0 ? NORTH : *y >= m->layout.height ? SOUTH : *x < 0 ? WEST : EAST;
    for (u32 i = 0; i < m->connections.count; i++) {
        const Connection *c = &m->connections.connection[i];
        const Map *next = &maps[find_map(c->group, c->map)];
        if (c->direction != direction) continue;
        if (direction == NORTH) *y = next->layout.height - 1, *x -= c->offset;
        if (direction == SOUTH) *y = 0, *x -= c->offset;
        if (direction == WEST) *x = next->layout.width - 1, *y -= c->offset;
        if (direction == EAST) *x = 0, *y -= c->offset;
        return next;
    }
    return 0;
}

static void set_walking(int i, int direction) {
    shift_x[i] = -16 * step_x[direction], shift_y[i] = -16 * step_y[direction];
    stepping[i] ^= 1;
}

static void try_walk(int direction) {
    Object *p = player();
    const Layout *l = &maps[here].layout;
    int x = p->x - 7 + step_x[direction], y = p->y - 7 + step_y[direction];
    if (blocked(x, y)) return;
    if (x < 0 || y < 0 || x >= l->width || y >= l->height) {
        const Map *next = across(&x, &y);
        if (!next) return;
        LOCKED = 1;
        load(next - maps);
        place(x, y);
        p->map = next->number, p->group = next->group;
        if (here == TOWN) set_flag(FLAG_TOWN);
        if (here == CITY) set_flag(FLAG_CITY);
        walk = 16;
        set_walking(PLAYER_INDEX, direction);
        frame();
        redraw();
        LOCKED = 0;
        return;
    }
    walk = 16;
    set_walking(PLAYER_INDEX, direction);
    place(x, y);
    if (direction == NORTH) draw_row(y - 5, x);
    if (direction == SOUTH) draw_row(y + 5, x);
    if (direction == WEST) draw_column(x - 7, y);
    if (direction == EAST) draw_column(x + 7, y);
}

void lose(void) {
    say("EVERYTHING GOES DARK...\nYOU WAKE UP IN TOWN.");
    heal();
    if (flag(FLAG_TOWN)) field_enter(TOWN, 9, 9, SOUTH);
    else field_enter(HOME, 10, 8, SOUTH);
}

static void arrived(void) {
    const Map *m = &maps[here];
    Object *p = player();
    int x = p->x - 7, y = p->y - 7;
    for (int i = 0; i < m->events.warps; i++) {
        const Warp *w = &m->events.warp[i];
        if (w->x != x || w->y != y) continue;
        int to = find_map(w->group, w->map);
        const Warp *end = &maps[to].events.warp[w->warp];
        if (maps[to].inside) field_enter(to, end->x, end->y - 1, NORTH);
        else field_enter(to, end->x, end->y + 1, SOUTH);
        if (here == CITY && flag(FLAG_BADGE) && !flag(FLAG_END)) {
            set_flag(FLAG_END);
            say("THE CITY CHEERS FOR YOU!\nYOUR QUEST IS COMPLETE.");
        }
        return;
    }
    if (here == WOODS && x == 7 && y == 3 && !flag(FLAG_TRAINER)) {
        talk(WOODS, 1);
        return;
    }
    if ((grid_at(x, y) & 255) == M_TALL && PARTY_COUNT && random(12) == 0) {
        if (battle(0, 1, random(2))) field_show();
        else lose();
    }
}

static void act(void) {
    Object *p = player();
    int facing = p->facing & 15, x = p->x - 7 + step_x[facing], y = p->y - 7 + step_y[facing];
    int i = someone_at(x, y), tile = grid_at(x, y) & 255;
    if (i > 0) {
        Object *o = &OBJECTS[i];
        if (shift_x[i] || shift_y[i]) return;
        o->facing = (facing == SOUTH ? NORTH : facing == NORTH ? SOUTH : facing == WEST ? EAST : WEST) * 0x11;
        sprites();
        talk(here, o->local);
    } else if (tile == M_TABLE_BAG) take_creature();
    else if (tile == M_TABLE) say("THE BAG IS GONE:\nYOU HAVE TAKEN IT.");
    else if (tile == M_LOCKED) say("THE DOOR IS BARRED.");
    else if (tile == M_GATE) say("A HEAVY GATE.\nTHE KEEPER HAS THE KEY.");
    else if (tile == M_SIGN)
        say(here == HOME ? x == 16 ? "PROF. MARL'S LAB." : "WILLOWBY\nNORTH: THE OLD ROAD"
            : here == ROUTE ? "THE OLD ROAD\nNORTH: BARLEY"
            : here == TOWN ? "BARLEY\nWEST: THE DIM WOOD"
                           : "CAIRN CITY\nTHE HALL OF MASTER FENN");
    else if (tile == M_SHELF) say("RULES OF THE CRAFT:\nFLAME EATS LEAF, SPARK BEATS TIDE.");
}

static void people_tick(void) {
    for (int i = 1; i < 5; i++) {
        Object *o = &OBJECTS[i];
        if (o->movement != 2) continue;
        if (shift_x[i] | shift_y[i]) {
            shift_x[i] -= shift_x[i] > 0 ? 1 : shift_x[i] < 0 ? -1 : 0;
            shift_y[i] -= shift_y[i] > 0 ? 1 : shift_y[i] < 0 ? -1 : 0;
            dirty = 1;
        } else if (--timer[i] == 0) {
            timer[i] = 160 + random(300);
            int d = 1 + random(4), x = o->x + step_x[d], y = o->y + step_y[d];
            int dx = x - o->home_x, dy = y - o->home_y, rx = o->range & 15, ry = o->range >> 4;
            o->facing = d * 0x11;
            dirty = 1;
            if (dx > rx || -dx > rx || dy > ry || -dy > ry || blocked(x - 7, y - 7)) continue;
            if ((grid_at(x - 7, y - 7) & 255) == M_DOOR) continue;
            o->old_x = o->x, o->old_y = o->y;
            o->x = x, o->y = y;
            set_walking(i, d);
        }
    }
}

void field_run(void) {
    for (;;) {
        frame();
        people_tick();
        if (walk) {
            int i = PLAYER_INDEX;
            shift_x[i] -= shift_x[i] > 0 ? 1 : shift_x[i] < 0 ? -1 : 0;
            shift_y[i] -= shift_y[i] > 0 ? 1 : shift_y[i] < 0 ? -1 : 0;
            dirty = 1;
            if (--walk == 0) {
                scroll(), sprites();
                dirty = 0;
                arrived();
            }
        } else if (pressed & KEY_START) {
            start_menu();
        } else if (pressed & KEY_A) {
            act();
        } else if (keys & (KEY_UP | KEY_DOWN | KEY_LEFT | KEY_RIGHT)) {
            int d = keys & KEY_UP ? NORTH : keys & KEY_DOWN ? SOUTH : keys & KEY_LEFT ? WEST : EAST;
            if ((player()->facing & 15) != d) player()->facing = d * 0x11, turn = 8, dirty = 1;
            else if (turn) turn--;
            else try_walk(d);
        } else {
            turn = 0;
        }
        if (dirty) scroll(), sprites(), dirty = 0;
    }
}
