// What the sources call of each other, and the structures of their arguments.
#pragma once
#include "vector.h"

// Adapters of layers with one input (lora.c; `lora_core.ops.native` fills these).

typedef struct {
    const T *a, *b;       // arenas [rows, I] and [rows, O]
    const T *gain, *bias; // tables [slots, O], or null
    int64_t num_columns;  // O
    int64_t column;       // where they begin in y
} Layer;

typedef struct {
    int32_t start, rank, has_gain, has_bias;
} Extent;

typedef struct {
    int64_t num_rows, num_groups, num_entries, num_adapters;
    const int32_t *rows;    // [num_rows] of x and y, group by group
    const int32_t *groups;  // [num_groups + 1][2] where a group's rows and its entries begin
    const int32_t *entries; // [num_entries] an adapter that the group wants: its place in `slots`
    const float *weights;   // [num_entries]
    const int32_t *slots;   // [num_adapters]
    const Extent *extents;  // [layers][num_adapters]
} Plan;

typedef struct {
    const Layer *layers;
    int64_t num_layers;
    const Plan *plan; // null: no row wants an adapter
} Adapters;

// Attention of new tokens (attention.c; `server.engine.attention.native` fills these).

// What is the same for all layers.
typedef struct {
    const int64_t *positions; // [tokens] where a token goes in the pools
    const int32_t *table;     // [sequences, table_width] blocks
    const int32_t *sequences; // [sequences][3] first new token, new tokens, all tokens
    const T *cos, *sin;       // [tokens, dim], to rotate queries and keys by; or null
    int64_t num_tokens, num_sequences, table_width;
} Step;

// A layer's.
typedef struct {
    const T *query, *key, *value; // [tokens, heads, dim], tokens `*_stride` apart
    T *out;                       // [tokens, num_heads, value_dim]
    T *keys, *values; // pools [num_kv_heads, blocks, dim, block_size] and [.., block_size, value_dim], heads `*_head` apart
    const float *sinks; // [num_heads] or null
    int64_t query_stride, key_stride, value_stride, keys_head, values_head;
    int64_t block_size, num_heads, num_kv_heads, dim, value_dim;
    int64_t window; // tokens that a query sees, itself included; 0 for all
    float scaling, softcap;
} Attention;

// Each returns 0, or something else if there is no memory.
// x [M, I] with rows `ldx` apart, bias [O] or null, y [M, O]; adapters of the product, which come next, or null.
typedef int Product(const T *x, int64_t ldx, const void *weight, const T *scales, const T *bias, T *y, int64_t M,
                    int64_t I, int64_t O, const Adapters *next);
Product linear, linear_int4;
int lora(T *y, int64_t ldy, const T *x, int64_t ldx, int64_t I, const T *base_bias, const Layer *layers,
         int64_t num_layers, const Plan *plan);
int attend(const Attention *a, const Step *s);
void rms_norm(const T *x, const T *weight, T *y, int64_t rows, int64_t size, float eps);
void norm_heads(T *x, const T *weight, int64_t tokens, int64_t stride, int64_t heads, int64_t dim, float eps);
void silu_gate(const T *x, T *y, int64_t rows, int64_t size);
void add_numbers(const T *a, const T *b, T *y, int64_t size);
