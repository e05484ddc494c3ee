// Decoder layers: x + O·attention(QKV·norm(x)), then that plus down(silu(gate)·up) of its norm, products with adapters.
//
// One call computes all of them, unless a product is not of this library: then the call ends before it, and whoever called
// multiplies and calls again. A step of a small model is hundreds of short operations, and Python between them, whose code
// the weights drive out of the caches, takes a third of the time.
#include "functions.h"
#include <time.h>

typedef struct {
    Product *multiply; // null: the caller multiplies
    const void *weight;
    const T *scales, *bias;
    int64_t num_in, num_out;
    Adapters adapters;
    const T *x;       // [rows, num_in]
    T *y;             // [rows, num_out]
} Projection;

enum { QKV, OUT, GATE_UP, DOWN, NUM_PROJECTIONS };

// Where time goes, for whoever wants to know.
typedef struct {
    double products, adapters, attention, others;
} Seconds;

// A layer; whatever it points to is its own, or memory for `rows` rows that layers use one after the other.
typedef struct {
    int64_t size;
    const T *norms[2];                 // [size], before attention and before the MLP
    float epsilons[2];                 // of the norms
    const T *head_norms[2];            // [dim], of each head of queries and of keys, or null
    float head_epsilons[2];            // of these
    Projection parts[NUM_PROJECTIONS]; // a part's x is what comes before it
    Attention attention;               // reads the first part's y, writes the second's x
} Decoder;

// What a pass through layers works on.
typedef struct {
    int64_t rows;
    T *hidden; // [rows, size], changed in place
    const Step *step;
    const int64_t *wanted; // ascending: if these are fewer rows, only they go on behind the last layer's attention
    int64_t num_wanted;
    Seconds *seconds; // or null
} Pass;

static double now(const Pass *pass) {
    struct timespec time;
    if (!pass->seconds)
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

// What comes before a product.
static int prepare(const Decoder *d, int part, const Pass *pass) {
    T *x = (T *)d->parts[part].x;
    double start = now(pass);
    int failed = 0;
    if (part == QKV)
        rms_norm(pass->hidden, d->norms[0], x, pass->rows, d->size, d->epsilons[0]);
    else if (part == OUT) {
        const Attention *a = &d->attention;
        int64_t numbers[] = {a->num_heads, a->num_kv_heads}, strides[] = {a->query_stride, a->key_stride};
        const T *heads[] = {a->query, a->key};
        for (int i = 0; i < 2 && d->head_norms[0]; i++)
            norm_heads((T *)heads[i], d->head_norms[i], pass->rows, strides[i], numbers[i], a->dim, d->head_epsilons[i]);
        failed = attend(a, pass->step);
    }
    else if (part == GATE_UP) {
        add_numbers(pass->hidden, d->parts[OUT].y, pass->hidden, pass->rows * d->size);
        rms_norm(pass->hidden, d->norms[1], x, pass->rows, d->size, d->epsilons[1]);
    } else
        silu_gate(d->parts[GATE_UP].y, x, pass->rows, d->parts[DOWN].num_in);
    if (pass->seconds)
        *(part == OUT ? &pass->seconds->attention : &pass->seconds->others) += now(pass) - start;
    return failed;
}

static int multiply(const Projection *p, const Pass *pass) {
    double start = now(pass);
    int failed = p->multiply(p->x, p->num_in, p->weight, p->scales, p->bias, p->y, pass->rows, p->num_in, p->num_out,
                             &p->adapters);
    if (pass->seconds)
        pass->seconds->products += now(pass) - start;
    return failed;
}

static int adapt(const Projection *p, const Pass *pass) {
    double start = now(pass);
    if (!p->adapters.plan)
        return 0;
    int failed = lora(p->y, p->num_out, p->x, p->num_in, p->num_in, p->bias, p->adapters.layers,
                      p->adapters.num_layers, p->adapters.plan);
    if (pass->seconds)
        pass->seconds->adapters += now(pass) - start;
    return failed;
}

// Some rows of x [.., size], ascending, move to its beginning.
static void keep(T *x, int64_t size, const int64_t *rows, int64_t num_rows) {
    for (int64_t i = 0; i < num_rows; i++)
        memmove(x + i * size, x + rows[i] * size, size * sizeof(T));
}

// From a product on, counted through all layers; `is_multiplied`: the caller has just done that one. Returns the product
// that the caller has to do next, their number at the end, or -1 if there is no memory.
int decoder_layers(const Decoder *layers, int64_t num_layers, const Pass *pass, int64_t product, int64_t is_multiplied) {
    int64_t last_out = (num_layers - 1) * NUM_PROJECTIONS + OUT;
    int is_cut = pass->num_wanted < pass->rows;
    Pass own = *pass;
    for (; product < num_layers * NUM_PROJECTIONS; product++, is_multiplied = 0) {
        const Decoder *d = layers + product / NUM_PROJECTIONS;
        int part = product % NUM_PROJECTIONS;
        const Projection *p = d->parts + part;
        own.rows = is_cut && product + is_multiplied > last_out ? pass->num_wanted : pass->rows;
        if (!is_multiplied) {
            if (prepare(d, part, &own))
                return -1;
            if (is_cut && product == last_out) {
                own.rows = pass->num_wanted;
                keep((T *)p->x, p->num_in, pass->wanted, own.rows);
                keep(own.hidden, d->size, pass->wanted, own.rows);
            }
            if (!p->multiply)
                return product;
            if (multiply(p, &own))
                return -1;
        }
        if (adapt(p, &own))
            return -1;
        if (part == DOWN)
            add_numbers(own.hidden, p->y, own.hidden, own.rows * d->size);
    }
    return product;
}
