// A group's product with one panel in one piece of assembly, for AVX2, as gcc moves sums between registers and memory.
// Whoever includes this says what MULTIPLY and ADD are; PANEL_CODE is not there where there is no such code.
#pragma once
#include "vector.h"

#if defined(__AVX2__) && VL == 8 && defined(__OPTIMIZE__) // else `rows` is no constant
// What is done with each unit of x. Operands 2r and 2r + 1 are the sums of row r, `left` and `right` the halves of what
// the panel has for it; .Lk counts units of x.
#define FIRST_UNIT(r, a, b)                                                                                            \
    ".if %c[rows] > " #r "\n\t"                                                                                        \
    "vpbroadcastd 4*" #r "(%[x]), %[factor]\n\t" MULTIPLY " %[factor], %[left], %" #a "\n\t" MULTIPLY                   \
    " %[factor], %[right], %" #b "\n\t"                                                                               \
    ".endif\n\t"
#define NEXT_UNIT(r, a, b)                                                                                             \
    ".if %c[rows] > " #r "\n\t"                                                                                        \
    "vpbroadcastd 4*(.Lk*%c[rows]+" #r ")(%[x]), %[factor]\n\t" MULTIPLY                                               \
    " %[factor], %[left], %[product]\n\t" MULTIPLY " %[factor], %[right], %[factor]\n\t" ADD                         \
    " %[product], %" #a ", %" #a "\n\t" ADD " %[factor], %" #b ", %" #b "\n\t"                                       \
    ".endif\n\t"
#define OF_ROWS(UNIT) UNIT(0, 0, 1) UNIT(1, 2, 3) UNIT(2, 4, 5) UNIT(3, 6, 7) UNIT(4, 8, 9) UNIT(5, 10, 11)
#define NEXT ".set .Lk, .Lk+1\n\t"
#define SUMS_OF(r) "=&x"(whole[r][0]), "=&x"(whole[r][1])

// whole [rows, 2] = the products of x [X_UNITS, rows] and w [W_UNITS, PANEL]; further operands are code's own.
#define PANEL_CODE(code, ...)                                                                                          \
    {                                                                                                                  \
        ivec left, right, factor, product;                                                                             \
        asm(".set .Lk, 0\n\t" code                                                                                     \
            : SUMS_OF(0), SUMS_OF(1), SUMS_OF(2), SUMS_OF(3), SUMS_OF(4), SUMS_OF(5), [left] "=&x"(left),              \
              [right] "=&x"(right), [factor] "=&x"(factor), [product] "=&x"(product)                                   \
            : [x] "r"(x), [w] "r"(w), [rows] "i"(rows), "m"(*(const Unit(*)[X_UNITS * rows])x),                        \
              "m"(*(const Unit(*)[W_UNITS * PANEL])w), ##__VA_ARGS__);                                                 \
    }
#endif
