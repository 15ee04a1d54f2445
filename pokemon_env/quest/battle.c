// Battles: big creatures, boxes, two menus. Flame hurts leaf, spark hurts tide.
#include "quest.h"

enum { SPECIES_LEAF = 511, SPECIES_TIDE = 512, BEAST_PALETTE = 9 };
static const char *const move_names[2] = {"FLAME", "SPARK"};
static const char *const foe_names[2] = {"MOSSLE", "DRIBBO"};

// Fills a party member: four blocks in the order that the personality gives, summed, then covered with its key.
void make_member(Member *m, int species, const char *nick, int level, int hp) {
    u16 plain[24];
    int order[4], left[4] = {0, 1, 2, 3}, rank;
    memset(m, 0, sizeof *m);
    memset(plain, 0, sizeof plain);
    m->pid = random(65536) << 16 | random(65536);
    m->ot = AT16(SAVE2_POINTER + 0x0A) | (u32)AT16(SAVE2_POINTER + 0x0C) << 16;
    encode(m->nick, nick, 10);
    memcpy(m->ot_name, (void *)SAVE2_POINTER, 7);
    m->language = 2;
    rank = m->pid % 24;
    for (int i = 0, left_count = 4; i < 4; i++, left_count--) { // the rank-th order of the four blocks, counted from 0
        static const u8 ways[4] = {6, 2, 1, 1};
        int k = rank / ways[i] % left_count;
        order[i] = left[k];
        for (; k < left_count - 1; k++) left[k] = left[k + 1];
    }
    for (int i = 0; i < 4; i++) {
        u16 *b = plain + 6 * i;
        if (order[i] == 0) b[0] = species, b[2] = level * level * level; // species, experience
        if (order[i] == 1) b[0] = 1, b[1] = 2, b[4] = 30 | 30 << 8;        // moves and their points
    }
    for (int i = 0; i < 24; i++) m->sum += plain[i];
    for (int i = 0; i < 12; i++) m->secure[i] = (plain[2 * i] | (u32)plain[2 * i + 1] << 16) ^ m->pid ^ m->ot;
    m->level = level;
    m->hp = m->max_hp = hp;
    for (int i = 0; i < 5; i++) m->stats[i] = 10 + level;
}

static void send_foe(int kind, int level, u32 count) {
    KIND = kind;
    make_member(ENEMY, kind == LEAF ? SPECIES_LEAF : SPECIES_TIDE, foe_names[kind], level, 30);
    ENEMY_COUNT = count;
}

static void bars(void) {
    box(0, 0, 16, 6, P_TEXT);
    print(2, 1, foe_names[KIND], P_TEXT);
    print(10, 1, KIND == LEAF ? "LEAF" : "TIDE", P_TEXT);
    bar(2, 3, 12, ENEMY->hp, ENEMY->max_hp);
    box(14, 8, 16, 6, P_TEXT);
    print(16, 9, starter_names[var(VAR_CHOICE)], P_TEXT);
    print_number(PARTY->hp < 10 ? 24 : 23, 9, PARTY->hp, P_TEXT);
    print(25, 9, "/", P_TEXT);
    print_number(26, 9, PARTY->max_hp, P_TEXT);
    bar(16, 11, 12, PARTY->hp, PARTY->max_hp);
}

static void stage(void) {
    sprites_clear();
    if (BATTLE_TYPE & 8) sprite(222, 28, S_PERSON, here == GYM ? 6 : 5, 2, 2, 0);
    if (ENEMY->hp) sprite(160, 6, KIND == LEAF ? S_LEAF : S_TIDE, BEAST_PALETTE + 3 + KIND, 0, 3, 0);
    if (PARTY->hp) sprite(24, 52, S_HERO, BEAST_PALETTE + var(VAR_CHOICE), 0, 3, 0);
    bars();
}

static void scenery(void) {
    for (int y = 0; y < 16; y++)
        for (int x = 0; x < 16; x++) {
            int m = y < 3 ? M_SKY : M_FIELD;
            if (y == 4 && x >= 9 && x < 15) m = M_DARK;
            if (y >= 6 && x >= 1 && x < 7) m = M_DARK;
            volatile u16 *to = MAP_SCREEN + y * 64 + x * 2;
            u32 entry = m * 4 | P_SCENE << 12;
            to[0] = entry, to[1] = entry + 1, to[32] = entry + 2, to[33] = entry + 3;
        }
    gfx_scene(BATTLE_TYPE >> 3 & 1);
    REG_BG1HOFS = REG_BG1VOFS = 0;
}

static void button(int x, int y, int w, int h, const char *name, int lit) {
    box(x, y, w, h, lit ? lit : P_TEXT);
    print(x + (w - (int)length(name)) / 2, y + h / 2, name, lit ? lit : P_TEXT);
}

// Each menu returns the choice; the move menu -1 when B goes back.
static int action_menu(void) {
    ACTION_CURSOR = 0;
    MENU = MENU_ACTION;
    for (;;) {
        static const char *const names[4] = {"FIGHT", "BAG X", "TEAM", "RUN"};
        for (int i = 0; i < 4; i++)
            button(15 * (i & 1), 14 + 3 * (i >> 1), 15, 3, names[i], ACTION_CURSOR == i ? P_LIT : 0);
        put(25, 15, '0' + potions(), ACTION_CURSOR == 1 ? P_LIT : P_TEXT);
        int before = ACTION_CURSOR;
        do {
            frame();
            if (pressed & KEY_A) return ACTION_CURSOR;
            if (pressed & KEY_LEFT) ACTION_CURSOR &= 2;
            else if (pressed & KEY_RIGHT) ACTION_CURSOR |= 1;
            else if (pressed & KEY_UP) ACTION_CURSOR &= 1;
            else if (pressed & KEY_DOWN) ACTION_CURSOR |= 2;
        } while (ACTION_CURSOR == before);
    }
}

static int move_menu(void) {
    MOVE_CURSOR = 0;
    MENU = MENU_MOVE;
    for (;;) {
        for (int i = 0; i < 2; i++) button(15 * i, 14, 15, 6, move_names[i], MOVE_CURSOR == i ? P_PICK : 0);
        int before = MOVE_CURSOR;
        do {
            frame();
            if (pressed & KEY_A) return MOVE_CURSOR;
            if (pressed & KEY_B) return -1;
            if (pressed & KEY_LEFT) MOVE_CURSOR = 0;
            else if (pressed & KEY_RIGHT) MOVE_CURSOR = 1;
        } while (MOVE_CURSOR == before);
    }
}

static void struck(int trainer) {
    u32 hurt = trainer ? 11 + random(4) : 3 + random(4);
    PARTY->hp = PARTY->hp > hurt ? PARTY->hp - hurt : 0;
}

// Fights `count` creatures, the first of kind `first_kind`, the next of the other. 1: won or fled, 0: lost.
int battle(int trainer, int count, int first_kind) {
    int kind = first_kind, result = 1;
    LOCKED = 1;
    CALLBACK2 = BATTLE_CALLBACK;
    IN_BATTLE |= 2;
    BATTLE_TYPE = 4 | (trainer ? 8 : 0);
    ACTION_CURSOR = MOVE_CURSOR = 0;
    MENU = MENU_MESSAGE;
    send_foe(kind, trainer ? 8 + trainer : 4 + (int)random(4), count);
    clear(0, 0, 30, 20);
    scenery();
    stage();
    message(trainer ? "A CHALLENGE!" : kind == LEAF ? "A WILD MOSSLE APPEARS!" : "A WILD DRIBBO APPEARS!");
    for (;;) {
        int action = action_menu();
        if (action == 0) {
            int move = move_menu();
            if (move < 0) continue;
            int good = move == KIND;
            u32 hit = good ? 15 + random(4) : 6 + random(2);
            ENEMY->hp = ENEMY->hp > hit ? ENEMY->hp - hit : 0;
            if (ENEMY->hp == 0) {
                count--;
                stage();
                message(count ? "THE FOE FALLS!\nANOTHER ONE STEPS UP." : "THE FOE FALLS! YOU WIN.");
                if (count == 0) break;
                kind ^= 1;
                send_foe(kind, 8 + trainer, count);
                stage();
                continue;
            }
            struck(trainer);
            stage();
            message(good ? "A STRONG HIT!\nTHE FOE STRIKES BACK." : "HARDLY A SCRATCH...\nTHE FOE STRIKES BACK.");
        } else if (action == 1) {
            if (PARTY->hp == PARTY->max_hp || !potions()) {
                message(potions() ? "NO NEED FOR A POTION." : "NO POTIONS LEFT.");
                continue;
            }
            drink();
            struck(trainer);
            stage();
            message("THE POTION HELPS.\nTHE FOE STRIKES.");
        } else if (action == 2) {
            message("THERE IS NOBODY ELSE.");
            continue;
        } else if (trainer) {
            message("THERE IS NO RUNNING NOW!");
            continue;
        } else {
            message("YOU GOT AWAY.");
            break;
        }
        if (PARTY->hp == 0) {
            message("YOUR CREATURE FAINTS!");
            result = 0;
            break;
        }
    }
    if (result && trainer && PARTY->level < 20) PARTY->level++;
    ENEMY_COUNT = 0;
    IN_BATTLE &= ~2;
    CALLBACK2 = FIELD_CALLBACK;
    MENU = MENU_NONE;
    LOCKED = 0;
    sprites_clear();
    field_show();
    return result;
}
