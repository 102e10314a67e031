/* Relaxed access to one double.

A cell has one writing process and, when it lives in a shared file, reading ones: eight aligned bytes must not tear. Under
the GIL one thread writes at a time, so an update is a load, an add and a store; without it, an update is a compare-and-swap
loop. */
#ifndef RKMETRICS_ATOMICS_H
#define RKMETRICS_ATOMICS_H

#include <stdint.h>
#include <string.h>

/* A quiet NaN that no user value can be: "this series does not exist" (model.UNSET). */
#define RK_UNSET_BITS UINT64_C(0x7FF80000524B4D31)

static inline uint64_t rk_bits(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double rk_double(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#if defined(__GNUC__) || defined(__clang__)
#define RK_LOAD(p) __atomic_load_n((uint64_t *)(p), __ATOMIC_RELAXED)
#define RK_STORE(p, bits) __atomic_store_n((uint64_t *)(p), (bits), __ATOMIC_RELAXED)
#define RK_SWAP(p, expected, bits) \
    __atomic_compare_exchange_n((uint64_t *)(p), (expected), (bits), 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)
#elif defined(Py_GIL_DISABLED)
#error "without the GIL, cells need the __atomic builtins of gcc or clang"
#else
#define RK_LOAD(p) (*(volatile uint64_t *)(p))
#define RK_STORE(p, bits) (*(volatile uint64_t *)(p) = (bits))
#endif

static inline double rk_get(const double *p) { return rk_double(RK_LOAD(p)); }
static inline void rk_set(double *p, double value) { RK_STORE(p, rk_bits(value)); }
static inline int rk_is_unset(const double *p) { return RK_LOAD(p) == RK_UNSET_BITS; }

/* Adds, counting an unset number as 0. Stores what was there before (0 for unset) and returns what is there now. */
static inline double rk_add(double *p, double amount, double *before)
{
#ifdef Py_GIL_DISABLED
    uint64_t old = RK_LOAD(p);
    for (;;) {
        *before = old == RK_UNSET_BITS ? 0.0 : rk_double(old);
        double sum = *before + amount;
        if (RK_SWAP(p, &old, rk_bits(sum)))
            return sum;
    }
#else
    uint64_t old = RK_LOAD(p);
    *before = old == RK_UNSET_BITS ? 0.0 : rk_double(old);
    double sum = *before + amount;
    rk_set(p, sum);
    return sum;
#endif
}

static inline void rk_raise_to(double *p, double value)
{
#ifdef Py_GIL_DISABLED
    uint64_t old = RK_LOAD(p);
    while (!(rk_double(old) >= value) && !RK_SWAP(p, &old, rk_bits(value)))
        ;
#else
    if (!(rk_get(p) >= value))
        rk_set(p, value);
#endif
}

#endif
