// Start, title screen, story.
#include "quest.h"

u16 keys, pressed;
u32 oam_shadow[128][2];
u8 oam_used, oam_changed;
static u8 oam_before;
static u32 seed;

void *memset(void *to, int value, u32 n) {
    for (u8 *p = to; n--;) *p++ = value;
    return to;
}

void *memcpy(void *to, const void *from, u32 n) {
    const u8 *q = from;
    for (u8 *p = to; n--;) *p++ = *q++;
    return to;
}

// Sleeps until the picture is drawn, then shows the sprites that changed and reads the keys.
void frame(void) {
    seed = seed * 1664525u + 1013904223u;
    REG_IF = 1;
    __asm__ volatile("swi 2" ::: "r0", "r1", "r2", "r3", "memory");
    if (oam_changed) {
        for (int i = 0; i < oam_used || i < oam_before; i++) {
            OAM[2 * i] = i < oam_used ? oam_shadow[i][0] : 0x0200; // off
            OAM[2 * i + 1] = i < oam_used ? oam_shadow[i][1] : 0;
        }
        oam_before = oam_used;
        oam_changed = 0;
    }
    u16 now = ~REG_KEYINPUT & 0x3FF;
    pressed = now & ~keys;
    keys = now;
}

void sprites_clear(void) { oam_used = 0, oam_changed = 1; }

void sprite(int x, int y, int tile, int palette, int shape, int size, int flip) {
    oam_shadow[oam_used][0] = (y & 255) | shape << 14 | (x & 511) << 16 | flip << 28 | (u32)size << 30;
    oam_shadow[oam_used++][1] = tile | 2 << 10 | palette << 12;
    oam_changed = 1;
}

u32 random(u32 below) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 16) * below >> 16;
}

// State kept in the save blocks ---------------------------------------------------------------------------------------
int flag(int id) { return SAVE1_POINTER ? AT8(SAVE1_POINTER + 0x1270 + (id >> 3)) >> (id & 7) & 1 : 0; }

void set_flag(int id) { AT8(SAVE1_POINTER + 0x1270 + (id >> 3)) |= 1 << (id & 7); }

void set_var(int id, int value) { AT16(SAVE1_POINTER + 0x139C + 2 * (id - 0x4000)) = value; }

int var(int id) { return AT16(SAVE1_POINTER + 0x139C + 2 * (id - 0x4000)); }

static u32 key(void) { return AT32(SAVE2_POINTER + 0xAC); }

u32 money(void) { return AT32(SAVE1_POINTER + 0x490) ^ key(); }

void set_money(u32 amount) { AT32(SAVE1_POINTER + 0x490) = amount ^ key(); }

u32 potions(void) { return (AT16(SAVE1_POINTER + 0x562) ^ key()) & 0xFFFF; }

void set_potions(u32 n) { // item 13 in the first slot
    AT16(SAVE1_POINTER + 0x560) = n ? 13 : 0;
    AT16(SAVE1_POINTER + 0x562) = n ^ key();
}

void heal(void) {
    if (PARTY_COUNT) PARTY->hp = PARTY->max_hp;
}

int drink(void) {
    if (!potions() || !PARTY_COUNT || PARTY->hp == PARTY->max_hp) return 0;
    set_potions(potions() - 1);
    heal();
    return 1;
}

void encode(u8 *to, const char *s, int n) { // the character set of the layout
    for (int i = 0; i < n; i++) to[i] = 0xFF;
    for (int i = 0; i < n && s[i]; i++) to[i] = s[i] == ' ' ? 0 : 0xBB + s[i] - 'A';
}

const char *const starter_names[3] = {"EMBIT", "SUNDO", "DUSKIT"};

// Menus on the field -------------------------------------------------------------------------------------------------
void take_creature(void) {
    int choice = 0, hold_sprites = oam_used;
    LOCKED = 1, SCRIPT = 0, MESSAGE_BOX = 1, MENU = MENU_CHOOSE;
    clear(0, 14, 30, 6);
    for (;;) {
        oam_used = hold_sprites;
        for (int i = 0; i < 3; i++) {
            box(10 * i, 11, 10, 9, choice == i ? P_LIT : P_TEXT);
            print(10 * i + 2, 18, starter_names[i], choice == i ? P_LIT : P_TEXT);
            sprite(80 * i + 24, 104, S_STARTER, 9 + i, 0, 2, 0);
            oam_shadow[oam_used - 1][1] &= ~(3 << 10); // in front of the boxes
        }
        do frame();
        while (!(pressed & (KEY_A | KEY_LEFT | KEY_RIGHT)));
        if (pressed & KEY_A) break;
        if (pressed & KEY_LEFT && choice > 0) choice--;
        if (pressed & KEY_RIGHT && choice < 2) choice++;
    }
    make_member(PARTY, 501 + choice, starter_names[choice], 10, 48);
    PARTY_COUNT = 1;
    set_var(VAR_CHOICE, choice);
    set_flag(FLAG_CREATURE);
    MENU = MENU_NONE;
    field_refresh();
    say("A NEW FRIEND! SHOW IT TO\nPROF. MARL IN WILLOWBY.");
}

void start_menu(void) {
    static const char *const names[3] = {"BAG", "TEAM", "CLOSE"};
    int choice = 0;
    LOCKED = 1, MENU = MENU_START;
    for (;;) {
        for (int i = 0; i < 3; i++) {
            box(18, 2 + 4 * i, 12, 4, choice == i ? P_LIT : P_TEXT);
            print(20, 4 + 4 * i, names[i], choice == i ? P_LIT : P_TEXT);
        }
        print(25, 4, "X", choice == 0 ? P_LIT : P_TEXT);
        print_number(26, 4, potions(), choice == 0 ? P_LIT : P_TEXT);
        do frame();
        while (!(pressed & (KEY_A | KEY_B | KEY_START | KEY_UP | KEY_DOWN)));
        if (pressed & (KEY_A | KEY_B | KEY_START)) break;
        if (pressed & KEY_UP && choice > 0) choice--;
        if (pressed & KEY_DOWN && choice < 2) choice++;
    }
    int go = pressed & KEY_A;
    clear(18, 2, 12, 12);
    if (go && choice == 0) {
        u32 had = potions();
        message(drink() ? "THE POTION HELPS." : had ? "NO NEED FOR A POTION." : "THE BAG IS EMPTY.");
    }
    if (go && choice == 1) message(PARTY_COUNT ? "ONE CREATURE IS WITH YOU." : "YOU WALK ALONE.");
    hud();
    LOCKED = 0, MENU = MENU_NONE;
}

// What people say ----------------------------------------------------------------------------------------------------
static void fight(int map, int level, int count, int given, const char *words) {
    int first = random(2);
    if (!battle(level, count, first)) {
        lose();
        return;
    }
    say(words);
    set_flag(given);
    for (int i = 1; i < 16; i++) // gone where the map says so
        if (OBJECTS[i].active && maps[map].events.person[i - 1].flag == given) OBJECTS[i].active = 0;
    hud();
    sprites();
}

void talk(int map, int local) {
    if (map == HOME || map == CITY || (map == TOWN && local == 3)) {
        say(map == HOME ? local == 1 ? "THE OLD ROAD IS LONG.\nDO NOT WALK IT ALONE." : "THE PROFESSOR IS IN THE LAB."
            : map == TOWN ? "THE GATE? TALK TO THE KEEPER\nIN THE WEST." : "THE HALL STANDS IN THE NORTH.");
    } else if (map == HOUSE) {
        heal(), hud();
        say("HAVE A REST, DEAR.");
    } else if (map == ROUTE) {
        say("NO PERMIT, NO PASSING.\nTHE PROFESSOR WRITES THEM.");
    } else if (map == LAB && !flag(FLAG_CREATURE)) {
        say("HELLO! MY BAG LIES ON THE\nOLD ROAD. TAKE A FRIEND OUT.");
    } else if (map == LAB && !flag(FLAG_PERMIT)) {
        say("WHAT A FINE FRIEND!\fHERE IS A PERMIT FOR THE ROAD\nAND 1000 COINS.\fTHREE POTIONS TOO. FAREWELL!");
        set_flag(FLAG_PERMIT);
        set_money(money() + 1000);
        set_potions(potions() + 3);
        heal(), hud();
    } else if (map == LAB || (map == TOWN && local == 1 && flag(FLAG_BOOK))) {
        heal(), hud();
        say("LET ME SEE... THERE.\nALL WELL AGAIN.");
    } else if (map == TOWN && local == 1) {
        say("PROF. MARL WROTE OF YOU.\fTAKE THIS FIELD BOOK.");
        set_flag(FLAG_BOOK);
        heal(), hud();
    } else if (map == TOWN && !flag(FLAG_BOOK)) {
        say("THE WOOD IS WILD. FETCH THE\nFIELD BOOK FROM THE AIDE.");
    } else if (map == TOWN && !flag(FLAG_GATE)) {
        say("A FIELD BOOK! WELL THEN.\fTHE TOLL IS 500 COINS.\nTHE GATE IS OPEN.");
        set_money(money() - 500);
        set_flag(FLAG_GATE);
        field_refresh();
    } else if (map == TOWN) {
        say("MIND THE MAN IN THE WOOD.");
    } else if (map == WOODS) {
        say("STOP! NOBODY GETS PAST ME!");
        fight(map, 1, 1, FLAG_TRAINER, "BAH! GO ON, THEN.");
    } else if (map == GYM && !flag(FLAG_BADGE)) {
        say("I AM FENN, MASTER HERE.\nSHOW ME WHAT YOU KNOW!");
        fight(map, 4, 2, FLAG_BADGE, "THE SEAL OF CAIRN IS YOURS.");
    } else if (map == GYM) {
        say("GO OUT AND BE PROUD.");
    }
}

// Title --------------------------------------------------------------------------------------------------------------
static int home_person(int x, int y) {
    const Events *e = &maps[HOME].events;
    for (int i = 0; i < e->people; i++)
        if (e->person[i].x == x && e->person[i].y == y) return 1;
    return 0;
}

static void new_game(u32 n) {
    u32 shift = 4 * (n % 16), count = 0, x = 0, y = 0;
    SAVE2_POINTER = 0x02024A54 + shift;
    STORAGE_POINTER = 0x02029808 + shift;
    seed = (n + 1) * 2654435761u;
    random(2), random(2);
    encode((u8 *)SAVE2_POINTER, "ROBIN", 8);
    for (int i = 0; i < 4; i++) AT8(SAVE2_POINTER + 0x0A + i) = random(256);
    AT32(SAVE2_POINTER + 0xAC) = random(65536) << 16 | random(65536) | 1;
    SAVE1_POINTER = 0x02025A00 + shift;
    set_money(0);
    set_potions(0);
    set_flag(FLAG_HOME);
    // start cells: the free ones at least two cells from the edge of the map, without flower beds
    for (int pass = 0; pass < 2; pass++) {
        u32 pick = pass ? n * 61 % count : 0, i = 0;
        for (y = 2; y < 14; y++) {
            for (x = 2; x < 18; x++) {
                int c = maps[HOME].rows[y][x];
                if ((c != '.' && c != ',') || home_person(x, y)) continue;
                if (pass && i == pick) break;
                i++;
            }
            if (pass && x < 18) break;
        }
        if (!pass) count = i;
    }
    CALLBACK2 = FIELD_CALLBACK;
    field_enter(HOME, x, y, 1 + random(4));
}

int main(void) {
    static const u32 zero = 0;
    u32 frames = 0;
    REG_IME = 0;
    REG_WAITCNT = 0x4317;
    REG_DISPCNT = 0x80; // blank
    REG_DMA3SRC = (u32)&zero, REG_DMA3DST = 0x02000000, REG_DMA3CNT = 0x85000000; // 256 KiB of zeros
    REG_DMA3SRC = (u32)&zero, REG_DMA3DST = 0x03000000, REG_DMA3CNT = 0x85000000 | 0x7000 / 4;
    REG_DISPSTAT = 8;
    REG_IE = 1;
    for (int i = 0; i < 128; i++) OAM[2 * i] = 0x0200;
    LOCKED = 1, SCRIPT = 2, MAGIC = 0x54534551;
    gfx_init();
    clear(0, 0, 32, 32);
    field_view(HOME, 10, 4);
    REG_BG0CNT = 0 | 0 << 2 | 30 << 8;
    REG_BG1CNT = 3 | 1 << 2 | 31 << 8;
    fill(4, 1, 22, 6, P_PICK);
    big(5, 2, "QUEST", P_PICK);
    box(1, 13, 28, 7, P_TEXT);
    print(9, 14, "PRESS START", P_TEXT);
    print(3, 16, "A LITTLE GAME OF ITS OWN", P_TEXT);
    print(9, 18, "NOT POKEMON", P_TEXT);
    frame(); // switched on between two pictures
    REG_DISPCNT = 0x40 | 1 << 8 | 1 << 9 | 1 << 12;
    do {
        frame();
        frames++;
    } while (!(keys & KEY_START));
    LOCKED = 1;
    new_game(frames);
    field_run();
    return 0;
}
