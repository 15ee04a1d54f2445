// Types, registers, the published memory layout and what the files share.
#ifndef QUEST_H
#define QUEST_H

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef signed short s16;
typedef unsigned int u32;
typedef signed int s32;

#define AT8(a) (*(volatile u8 *)(a))
#define AT16(a) (*(volatile u16 *)(a))
#define AT32(a) (*(volatile u32 *)(a))

// Hardware -----------------------------------------------------------------------------------------------------------
#define REG_DISPCNT AT16(0x04000000)
#define REG_DISPSTAT AT16(0x04000004)
#define REG_BG0CNT AT16(0x04000008)
#define REG_BG1CNT AT16(0x0400000A)
#define REG_BG1HOFS AT16(0x04000014)
#define REG_BG1VOFS AT16(0x04000016)
#define REG_KEYINPUT AT16(0x04000130)
#define REG_IE AT16(0x04000200)
#define REG_IF AT16(0x04000202)
#define REG_WAITCNT AT16(0x04000204)
#define REG_IME AT16(0x04000208)
#define REG_DMA3SRC AT32(0x040000D4)
#define REG_DMA3DST AT32(0x040000D8)
#define REG_DMA3CNT AT32(0x040000DC)
#define BG_PALETTE ((volatile u16 *)0x05000000)
#define OBJ_PALETTE ((volatile u16 *)0x05000200)
#define UI_TILES ((volatile u16 *)0x06000000)
#define MAP_TILES ((volatile u16 *)0x06004000)
#define UI_SCREEN ((volatile u16 *)0x0600F000)
#define MAP_SCREEN ((volatile u16 *)0x0600F800)
#define OBJ_TILES ((volatile u16 *)0x06010000)
#define OAM ((volatile u32 *)0x07000000)

enum { KEY_A = 1, KEY_B = 2, KEY_SELECT = 4, KEY_START = 8, KEY_RIGHT = 16, KEY_LEFT = 32, KEY_UP = 64,
    KEY_DOWN = 128 };

#define RGB(r, g, b) ((r) | (g) << 5 | (b) << 10)

// Published state: the places where the reader of pokemon_env looks ---------------------------------------------------
#define LOCKED AT8(0x03000F2C)          // 1: the field takes no keys
#define SCRIPT AT8(0x03000E38)          // 0: a dialogue runs, 2: none
#define CALLBACK2 AT32(0x030022C4)      // FIELD_CALLBACK or BATTLE_CALLBACK
#define IN_BATTLE AT8(0x030026F9)       // bit 1
#define SAVE1_POINTER AT32(0x03005D8C)
#define SAVE2_POINTER AT32(0x03005D90)
#define STORAGE_POINTER AT32(0x03005D94)
#define GRID_HEADER ((volatile u32 *)0x03005DC0) // width, height, pointer
#define BATTLE_TYPE AT32(0x02022FEC)    // bit 3: trainer
#define ACTION_CURSOR AT8(0x020244AC)
#define MOVE_CURSOR AT8(0x020244B0)
#define PARTY_COUNT AT8(0x020244E9)
#define ENEMY_COUNT AT8(0x020244EA)
#define PARTY ((Member *)0x020244EC)
#define ENEMY ((Member *)0x02024744)
#define WARP_GROUP AT8(0x020322E4)
#define WARP_NUMBER AT8(0x020322E5)
#define GRID ((u16 *)0x02032318)
#define MAP_HEADER ((volatile u32 *)0x02037318) // layout, events, scripts, connections
#define OBJECTS ((Object *)0x02037350)
#define PLAYER_INDEX AT8(0x02037595)
#define MESSAGE_BOX AT8(0x020375BC)
#define MENU AT8(0x0203F000) // this game's own: which menu is on the screen
#define KIND AT8(0x0203F001) // this game's own: 0 leaf, 1 tide
#define MAGIC AT32(0x0203F004)
#define CANVAS ((u8 *)0x02030000) // scratch for drawing, only used before the title screen

#define FIELD_CALLBACK 0x08085E5D
#define BATTLE_CALLBACK 0x08038421

enum { MENU_NONE, MENU_MESSAGE, MENU_START, MENU_CHOOSE, MENU_ACTION, MENU_MOVE };
enum { LEAF, TIDE };

enum {
    FLAG_GATE = 0x20,     // this game's own: toll paid
    FLAG_END = 0x21,      // this game's own: closing words said
    FLAG_PERMIT = 0x74,
    FLAG_TRAINER = 0x50A,
    FLAG_CREATURE = 0x860,
    FLAG_BOOK = 0x861,
    FLAG_BADGE = 0x867,
    FLAG_HOME = 0x86F,
    FLAG_TOWN = 0x870,
    FLAG_CITY = 0x879,
    VAR_CHOICE = 0x4023,
};

typedef struct { // an object event, 0x24 bytes
    u8 active, unused1[3], sprite, look, movement, trainer, local, map, group, elevation;
    s16 home_x, home_y, x, y, old_x, old_y; // x and y are 7 more than on the map
    u8 facing, range, unused2[10];
} Object;

typedef struct { // a creature, 100 bytes
    u32 pid, ot;
    u8 nick[10], language, egg, ot_name[7], marks;
    u16 sum, pad;
    u32 secure[12];
    u32 status;
    u8 level, mail;
    u16 hp, max_hp, stats[5];
} Member;

_Static_assert(sizeof(Object) == 0x24, "object event");
_Static_assert(sizeof(Member) == 100, "party member");

// Maps, in the layout of the game whose reader is shared -------------------------------------------------------------
typedef struct {
    u8 local, look, kind, pad;
    s16 x, y;
    u8 elevation, movement; // movement 1: stands, 2: wanders
    u16 range;              // x in bits 0-3, y in bits 4-7
    u16 trainer, sight;
    const void *script;
    u16 flag, pad2; // gone once this flag is set
} Person;

typedef struct {
    s16 x, y;
    u8 elevation, warp, map, group;
} Warp;

typedef struct {
    u8 people, warps, coords, backgrounds;
    const Person *person;
    const Warp *warp;
    const void *coord, *background;
} Events;

typedef struct {
    u8 direction, pad[3];
    s32 offset;
    u8 group, map, pad2[2];
} Connection;

typedef struct {
    u32 count;
    const Connection *connection;
} Connections;

typedef struct {
    s32 width, height;
    const void *border, *cells;
} Layout;

typedef struct {
    u16 ground[3], tree[3], path[2], roof_a[3], roof_b[3], floor[2], carpet[2], ribbon;
} Theme;

typedef struct {
    Layout layout;
    Events events;
    Connections connections;
    u8 group, number, inside;
    char border;
    const char *const *rows;
    Theme theme;
} Map;

enum { SOUTH = 1, NORTH, WEST, EAST };
enum { HOME, ROUTE, TOWN, WOODS, CITY, GYM, LAB, HOUSE, MAPS };

// gfx.c
enum Metatile {
    M_GRASS, M_GRASS_LAST = M_GRASS + 7, M_PATH, M_PATH_LAST = M_PATH + 3, M_TALL, M_TREE, M_PINE, M_WATER, M_FENCE,
    M_BED, M_ROCK, M_CLIFF, M_TABLE_BAG, M_TABLE, M_GATE, M_GATE_OPEN, M_SIGN,
    M_ROOF_L, M_ROOF, M_ROOF_R, M_WALL_L, M_WALL_R, M_WINDOW, M_DOOR, M_LOCKED, M_GYM_DOOR,
    M_FLOOR, M_FLOOR_LAST = M_FLOOR + 3, M_CARPET, M_MAT, M_BRICK, M_SHELF, M_DESK, M_MACHINE, M_PLANT, M_STATUE,
        M_BED2, M_VOID,
    M_SKY, M_FIELD, M_DARK, M_COUNT
};
enum { P_TERRAIN, P_HOUSE_A, P_HOUSE_B, P_INSIDE, P_SCENE, P_GREEN = 8, P_YELLOW, P_RED, P_PICK, P_RIBBON, P_ICON,
    P_LIT, P_TEXT };
enum { // tiles of the upper layer: letters at their ASCII code, then
    U_BLANK = 0, U_QUAD = 1, U_FRAME = 96, U_BAR = 112, U_ICON = 132
};
enum { I_SLOT, I_CREATURE, I_PERMIT, I_BOOK, I_BADGE, I_COIN, I_POTION };
enum { S_PERSON = 0, S_STARTER = 48, S_LEAF = 64, S_TIDE = 128, S_HERO = 192 };
void gfx_init(void);
void gfx_theme(const Theme *theme);
void gfx_scene(int trainer);
extern const u8 glyphs[59][8];

// text.c
u32 length(const char *s);
void put(int x, int y, int tile, int palette);
void print(int x, int y, const char *s, int palette);
void print_number(int x, int y, u32 n, int palette);
void fill(int x, int y, int w, int h, int palette);
void box(int x, int y, int w, int h, int palette);
void clear(int x, int y, int w, int h);
void bar(int x, int y, int w, u32 value, u32 max);
void big(int x, int y, const char *s, int palette);
void message(const char *pages);
void say(const char *pages);

// maps.c
extern const Map maps[MAPS];
int cell_char(int map, int x, int y);
int metatile_at(int map, int x, int y, int *blocked);
int metatile_palette(int metatile);
int find_map(int group, int number);

// field.c
extern int here;
void field_enter(int map, int x, int y, int facing);
void field_view(int map, int x, int y);
void field_show(void);
void field_refresh(void);
void field_run(void);
void lose(void);
void hud(void);
void sprites(void);

// battle.c
int battle(int trainer, int count, int first_kind);
void make_member(Member *m, int species, const char *nick, int level, int hp);

// main.c
extern const char *const starter_names[3];
extern u16 keys, pressed;
extern u32 oam_shadow[128][2];
extern u8 oam_used, oam_changed;
void frame(void);
void sprite(int x, int y, int tile, int palette, int shape, int size, int flip);
void sprites_clear(void);
u32 random(u32 below);
int flag(int id);
void set_flag(int id);
void set_var(int id, int value);
int var(int id);
u32 money(void);
void set_money(u32 amount);
u32 potions(void);
void set_potions(u32 n);
int drink(void);
void heal(void);
void talk(int map, int local);
void take_creature(void);
void start_menu(void);
void encode(u8 *to, const char *s, int n);
void *memset(void *to, int value, u32 n);
void *memcpy(void *to, const void *from, u32 n);

#endif
