// Of a group's product with one panel, for AVX2: what is done with each unit of x. All of it is one piece of assembly, as
// gcc moves sums between registers and memory. Whoever includes this says what MULTIPLY and ADD are.
//
// Operands 2r and 2r + 1 are the sums of row r, `left` and `right` the panel's halves of a unit; .Lk counts units of x.
#pragma once

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
