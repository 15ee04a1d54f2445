@ Cartridge header and first instructions. The logo field is left zero: emulators start it, a console would not.
    .section .crt0, "ax"
    .arm
    .global _start
_start:
    b start
    .space 156                  @ logo
    .ascii "QUEST\0\0\0\0\0\0\0"    @ title, 12 bytes
    .ascii "QEST"               @ game code
    .ascii "00"                 @ maker
    .byte 0x96, 0, 0
    .space 7
    .byte 0                     @ version
    .byte 0x22                  @ checksum of 0xA0 to 0xBC
    .space 2
start:
    mov r0, #0x12               @ interrupt mode keeps its own stack although no interrupt is taken
    msr cpsr_c, r0
    ldr sp, =0x03007FA0
    mov r0, #0x1F
    msr cpsr_c, r0
    ldr sp, =0x03007F00
    ldr r0, =main
    bx r0
    .pool
