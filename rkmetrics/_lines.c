/* Sample lines from columns of numbers: what rkmetrics/_lines_py.py explains, as bytes are copied.

Rules that keep this file safe:
  - What is read without the interpreter's lock is immutable: bytes and str inside tuples that the caller holds. The numbers
    should be too, but nothing relies on it: which series exist is decided once and kept in `present`, and any double at all
    fits in NUMBER_SPACE, so a racing writer could make a number wrong and never a write out of bounds.
  - Doubles become digits without locale, allocation or interpreter, so that all of it can run beside other threads.

Digits: Raffaello Giulietti, "The Schubfach way to render doubles" (2020); section numbers below are of that paper. The same
digits as repr(), which are the shortest that read back as the number, and of those the nearest to it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "_pow10.h"

#define NUMBER_SPACE 24 /* the longest: -2.2250738585072014e-308 */
#define UNSET_BITS UINT64_C(0x7FF80000524B4D31) /* model.UNSET_BYTES */

/* Up to here the interpreter's lock is kept: getting it back may take longer (5 ms beside a busy thread) than the lines do. */
#define FEW_LINES 4096

/* ---- A double as digits --------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t digits;
    int exponent;
} decimal;

/* The high half of a product, and its low half. */
static inline uint64_t multiply(uint64_t a, uint64_t b, uint64_t *low)
{
#if defined(__SIZEOF_INT128__) && !defined(RKMETRICS_PORTABLE_MULTIPLY)
    unsigned __int128 product = (unsigned __int128)a * b;
    *low = (uint64_t)product;
    return (uint64_t)(product >> 64);
#else
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (uint32_t)middle;
    *low = a * b;
    return a1 * b1 + (middle >> 32) + (other >> 32);
#endif
}

/* floor(x / 2**n) for negative x too; C leaves >> of those to the compiler. */
static inline int floor_shift(int x, int n)
{
    return x >= 0 ? x >> n : ~(~x >> n);
}

/* The product with a power of ten, without its last 128 bits: odd when any of those is set ("round to odd", 9.6). */
static inline uint64_t scaled(uint64_t high, uint64_t low, uint64_t factor)
{
    uint64_t ignored, middle, carry = multiply(low, factor, &ignored), top = multiply(high, factor, &middle);
    middle += carry;
    top += middle < carry;
    return top | (middle > 1);
}

/* The shortest decimal in the rounding interval of fraction and exponent (the fields of a double that is finite, not 0). */
static decimal shortest(uint64_t fraction, int field)
{
    uint64_t c = field ? fraction | UINT64_C(1) << 52 : fraction;
    int q = (field ? field : 1) - 1075;
    int below_is_nearer = fraction == 0 && field > 1; /* a power of two: the gap below it is half the gap above */
    int odd = c & 1;                                  /* then the interval's ends would be read as a neighbour */

    /* k = floor(log10(width of the interval)): one of 10**k's multiples, and at most one of 10**(k+1)'s, is inside. */
    int k = floor_shift(q * 1262611 - (below_is_nearer ? 524031 : 0), 22);
    int h = q + floor_shift(-k * 1741647, 19) + 1;
    uint64_t high = pow10_table[-k - POW10_MIN_EXPONENT].high, low = pow10_table[-k - POW10_MIN_EXPONENT].low;

    /* Four times the number and the ends of its interval, all divided by 10**k. */
    uint64_t lower = scaled(high, low, (4 * c - 2 + below_is_nearer) << h) + odd;
    uint64_t number = scaled(high, low, (4 * c) << h);
    uint64_t upper = scaled(high, low, (4 * c + 2) << h) - odd;

    uint64_t s = number / 4;
    if (s >= 10) {
        uint64_t tens = s / 10;
        int down = lower <= 40 * tens, up = 40 * tens + 40 <= upper;
        if (down != up)
            return (decimal){tens + up, k + 1};
    }
    int down = lower <= 4 * s, up = 4 * s + 4 <= upper;
    if (down != up)
        return (decimal){s + up, k};
    uint64_t half = 4 * s + 2;
    return (decimal){s + (number > half || (number == half && (s & 1))), k};
}

static const char PAIRS[] = "00010203040506070809101112131415161718192021222324252627282930313233343536373839404142434445464748495051525354"
                            "5556575859606162636465666768697071727374757677787980818283848586878889909192939495969798"
                            "99";

/* Write the decimal digits of n so that they end at end; their start. */
static inline char *write_digits(char *end, uint64_t n)
{
    while (n >= 100) {
        end -= 2;
        memcpy(end, PAIRS + 2 * (n % 100), 2);
        n /= 100;
    }
    if (n >= 10) {
        end -= 2;
        memcpy(end, PAIRS + 2 * n, 2);
    } else
        *--end = (char)('0' + n);
    return end;
}

static inline char *copy(char *out, const char *from, size_t size)
{
    memcpy(out, from, size);
    return out + size;
}

static char *write_exponent(char *out, int exponent)
{
    char space[4], *end = space + sizeof space, *start;
    *out++ = 'e';
    *out++ = exponent < 0 ? '-' : '+';
    start = write_digits(end, (uint64_t)(exponent < 0 ? -exponent : exponent));
    if (end - start < 2)
        *--start = '0';
    return copy(out, start, (size_t)(end - start));
}

/* Digits and exponent as repr() spells them: positional from 0.0001 to below 1e16, and without ".0". */
static char *write_decimal(char *out, decimal d)
{
    char space[20], *end = space + sizeof space, *start;
    while (d.digits % 10 == 0) {
        d.digits /= 10;
        d.exponent++;
    }
    start = write_digits(end, d.digits);
    int count = (int)(end - start), point = count + d.exponent; /* the number is 0.digits * 10**point */
    if (point <= -4 || point > 16) {
        *out++ = *start++;
        if (start < end) {
            *out++ = '.';
            out = copy(out, start, (size_t)(end - start));
        }
        return write_exponent(out, point - 1);
    }
    if (point <= 0) {
        out = copy(out, "0.000", (size_t)(2 - point));
        return copy(out, start, (size_t)count);
    }
    if (point >= count) {
        out = copy(out, start, (size_t)count);
        memset(out, '0', (size_t)(point - count));
        return out + (point - count);
    }
    out = copy(out, start, (size_t)point);
    *out++ = '.';
    return copy(out, start + point, (size_t)(count - point));
}

/* Write at most NUMBER_SPACE bytes; the end. */
static inline char *write_number(char *out, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint64_t fraction = bits & ((UINT64_C(1) << 52) - 1);
    int field = (int)(bits >> 52 & 0x7FF);
    if (field == 0x7FF) {
        if (fraction)
            return copy(out, "NaN", 3);
        return copy(out, bits >> 63 ? "-Inf" : "+Inf", 4);
    }
    if (bits >> 63)
        *out++ = '-';
    if (field == 0 && fraction == 0) {
        *out++ = '0';
        return out;
    }
    if (field >= 1023 && field < 1023 + 53) { /* from 1 to below 2**53: most numbers are whole, and print as they are */
        uint64_t whole = fraction | UINT64_C(1) << 52;
        int below_one = 1075 - field;
        if ((whole & ((UINT64_C(1) << below_one) - 1)) == 0) {
            char space[20], *end = space + sizeof space, *start = write_digits(end, whole >> below_one);
            return copy(out, start, (size_t)(end - start));
        }
    }
    return write_decimal(out, shortest(fraction, field));
}

/* ---- A family's lines ----------------------------------------------------------------------------------------------- */

typedef struct {
    const char *start;
    Py_ssize_t size;
} text;

typedef struct {
    Py_ssize_t position;
    text text;
} tail;

/* Everything that is written, found out with the interpreter's lock held. */
typedef struct {
    text head;
    text *pres, *posts, *names;
    tail *tails;
    Py_ssize_t name_count, combo_count, line_count; /* lines of one combo */
    Py_ssize_t tail_count, width, bounds;
    const char *values; /* doubles, perhaps not aligned */
    char *present;      /* one flag for each series */
    char *escaped;      /* where escaped names are */
} plan;

static inline double value_at(const plan *p, Py_ssize_t position)
{
    double value;
    memcpy(&value, p->values + position * (Py_ssize_t)sizeof value, sizeof value);
    return value;
}

static inline char *write_line(char *out, const plan *p, Py_ssize_t line, text name, double value)
{
    out = copy(out, p->pres[line].start, (size_t)p->pres[line].size);
    out = copy(out, name.start, (size_t)name.size);
    out = copy(out, p->posts[line].start, (size_t)p->posts[line].size);
    return write_number(out, value);
}

/* The tail at position, if there is one. Positions come in rising order, so one cursor sees them all. */
static inline char *write_tail(char *out, const plan *p, Py_ssize_t *cursor, Py_ssize_t position)
{
    while (*cursor < p->tail_count && p->tails[*cursor].position < position)
        ++*cursor;
    if (*cursor < p->tail_count && p->tails[*cursor].position == position)
        out = copy(out, p->tails[*cursor].text.start, (size_t)p->tails[*cursor].text.size);
    *out++ = '\n';
    return out;
}

static char *write_series(char *out, const plan *p, Py_ssize_t *cursor, Py_ssize_t line, text name, Py_ssize_t position)
{
    if (p->bounds < 0) {
        out = write_line(out, p, line, name, value_at(p, position));
        return write_tail(out, p, cursor, position);
    }
    double count = 0.0;
    for (Py_ssize_t k = 0; k <= p->bounds; k++) {
        count += value_at(p, position + k);
        out = write_line(out, p, line + k, name, count);
        out = write_tail(out, p, cursor, position + k);
    }
    out = write_line(out, p, line + p->bounds + 1, name, value_at(p, position + p->bounds + 1));
    *out++ = '\n';
    out = write_line(out, p, line + p->bounds + 2, name, count);
    *out++ = '\n';
    return out;
}

static char *write_family(char *out, const plan *p)
{
    Py_ssize_t cursor = 0, series = 0;
    out = copy(out, p->head.start, (size_t)p->head.size);
    for (Py_ssize_t i = 0; i < p->name_count; i++)
        for (Py_ssize_t j = 0; j < p->combo_count; j++, series++)
            if (p->present[series])
                out = write_series(out, p, &cursor, j * p->line_count, p->names[i], series * p->width);
    return out;
}

/* Mark the series that exist. Their lines' count, and in *space what they and the head take at most; -1 when that overflows. */
static Py_ssize_t measure(const plan *p, Py_ssize_t *space)
{
    Py_ssize_t lines = 0, series = 0, limit = PY_SSIZE_T_MAX / 2;
    *space = p->head.size;
    for (Py_ssize_t c = 0; c < p->tail_count; c++) {
        if (p->tails[c].text.size > limit - *space)
            return -1;
        *space += p->tails[c].text.size;
    }
    for (Py_ssize_t i = 0; i < p->name_count; i++)
        for (Py_ssize_t j = 0; j < p->combo_count; j++, series++) {
            uint64_t bits;
            memcpy(&bits, p->values + series * p->width * (Py_ssize_t)sizeof bits, sizeof bits);
            p->present[series] = bits != UNSET_BITS;
            if (!p->present[series])
                continue;
            lines += p->line_count;
            for (Py_ssize_t k = j * p->line_count; k < (j + 1) * p->line_count; k++) {
                Py_ssize_t line = p->pres[k].size + p->posts[k].size + p->names[i].size + NUMBER_SPACE + 1;
                if (line > limit - *space)
                    return -1;
                *space += line;
            }
        }
    return lines;
}

/* ---- From Python and back ------------------------------------------------------------------------------------------- */

static void *allocate(Py_ssize_t count, size_t size)
{
    if ((size_t)count > PY_SSIZE_T_MAX / size / 2) {
        PyErr_NoMemory();
        return NULL;
    }
    void *space = PyMem_Malloc((size_t)(count ? count : 1) * size);
    if (!space)
        PyErr_NoMemory();
    return space;
}

static int expect(PyObject *object, int fits, const char *what)
{
    if (!fits)
        PyErr_Format(PyExc_TypeError, "expected %s, got %.100s", what, Py_TYPE(object)->tp_name);
    return fits;
}

static int text_of_bytes(PyObject *object, text *into)
{
    if (!expect(object, PyBytes_Check(object), "bytes"))
        return 0;
    *into = (text){PyBytes_AS_STRING(object), PyBytes_GET_SIZE(object)};
    return 1;
}

static text *texts_of_tuple(PyObject *tuple)
{
    if (!expect(tuple, PyTuple_Check(tuple), "a tuple of bytes"))
        return NULL;
    text *texts = allocate(PyTuple_GET_SIZE(tuple), sizeof(text));
    if (!texts)
        return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++)
        if (!text_of_bytes(PyTuple_GET_ITEM(tuple, i), &texts[i])) {
            PyMem_Free(texts);
            return NULL;
        }
    return texts;
}

static int needs_escape(char c)
{
    return c == '\\' || c == '"' || c == '\n';
}

/* Names as UTF-8, escaped where they have to be (Prometheus' "Text format details": \\, \" and \n in label values). */
static int plan_names(plan *p, PyObject *tuple)
{
    Py_ssize_t escaped_size = 0;
    if (!expect(tuple, PyTuple_Check(tuple), "a tuple of str"))
        return 0;
    p->name_count = PyTuple_GET_SIZE(tuple);
    if (!(p->names = allocate(p->name_count, sizeof(text))))
        return 0;
    for (Py_ssize_t i = 0; i < p->name_count; i++) {
        PyObject *name = PyTuple_GET_ITEM(tuple, i);
        if (!expect(name, PyUnicode_Check(name), "str") || !(p->names[i].start = PyUnicode_AsUTF8AndSize(name, &p->names[i].size)))
            return 0;
        Py_ssize_t extra = 0;
        for (Py_ssize_t k = 0; k < p->names[i].size; k++)
            extra += needs_escape(p->names[i].start[k]);
        if (extra)
            escaped_size += p->names[i].size + extra;
    }
    if (!escaped_size)
        return 1;
    if (!(p->escaped = allocate(escaped_size, 1)))
        return 0;
    char *out = p->escaped;
    for (Py_ssize_t i = 0; i < p->name_count; i++) {
        text name = p->names[i];
        char *start = out;
        Py_ssize_t clean = 0;
        while (clean < name.size && !needs_escape(name.start[clean]))
            clean++;
        if (clean == name.size)
            continue;
        for (Py_ssize_t k = 0; k < name.size; k++) {
            char c = name.start[k];
            if (needs_escape(c))
                *out++ = '\\';
            *out++ = c == '\n' ? 'n' : c;
        }
        p->names[i] = (text){start, out - start};
    }
    return 1;
}

static int plan_tails(plan *p, PyObject *tuple)
{
    if (!expect(tuple, PyTuple_Check(tuple), "a tuple of (int, bytes)"))
        return 0;
    p->tail_count = PyTuple_GET_SIZE(tuple);
    if (!(p->tails = allocate(p->tail_count, sizeof(tail))))
        return 0;
    for (Py_ssize_t i = 0; i < p->tail_count; i++) {
        PyObject *pair = PyTuple_GET_ITEM(tuple, i);
        if (!expect(pair, PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2, "(int, bytes)"))
            return 0;
        p->tails[i].position = PyLong_AsSsize_t(PyTuple_GET_ITEM(pair, 0));
        if (p->tails[i].position == -1 && PyErr_Occurred())
            return 0;
        if (!text_of_bytes(PyTuple_GET_ITEM(pair, 1), &p->tails[i].text))
            return 0;
        if (p->tails[i].position < (i ? p->tails[i - 1].position + 1 : 0)) {
            PyErr_SetString(PyExc_ValueError, "tails are not in rising order");
            return 0;
        }
    }
    return 1;
}

/* Take the arguments apart; view is filled (and released by the caller) when view->obj is set. */
static int plan_family(plan *p, Py_buffer *view, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 7 || nargs > 8) {
        PyErr_Format(PyExc_TypeError, "encode() takes 7 or 8 arguments, got %zd", nargs);
        return 0;
    }
    if (!text_of_bytes(args[0], &p->head) || !(p->pres = texts_of_tuple(args[1])) || !(p->posts = texts_of_tuple(args[2])) ||
        !plan_names(p, args[3]))
        return 0;
    p->bounds = PyLong_AsSsize_t(args[5]);
    if (p->bounds == -1 && PyErr_Occurred())
        return 0;
    p->width = PyLong_AsSsize_t(args[6]);
    if (p->width == -1 && PyErr_Occurred())
        return 0;
    if (nargs == 8 && !plan_tails(p, args[7]))
        return 0;

    Py_ssize_t lines = PyTuple_GET_SIZE(args[1]);
    if (p->bounds > 1 << 20 || p->width > 1 << 20 || p->width < (p->bounds < 0 ? 1 : p->bounds + 2) ||
        PyTuple_GET_SIZE(args[2]) != lines || lines % (p->bounds < 0 ? 1 : p->bounds + 3)) {
        PyErr_SetString(PyExc_ValueError, "pres, posts, bounds and width do not fit together");
        return 0;
    }
    p->line_count = p->bounds < 0 ? 1 : p->bounds + 3;
    p->combo_count = lines / p->line_count;

    if (PyObject_GetBuffer(args[4], view, PyBUF_FORMAT | PyBUF_ND) < 0)
        return 0;
    if (view->ndim != 1 || !view->format || strcmp(view->format, "d")) {
        PyErr_SetString(PyExc_TypeError, "values are not a buffer of doubles, like array('d')");
        return 0;
    }
    p->values = view->buf;
    Py_ssize_t count = view->len / (Py_ssize_t)sizeof(double), series = count / p->width;
    if (count % p->width || (p->name_count && p->combo_count ? series % p->name_count || series / p->name_count != p->combo_count : series)) {
        PyErr_Format(PyExc_ValueError, "%zd values; expected %zd names x %zd combos x %zd", count, p->name_count, p->combo_count,
                     p->width);
        return 0;
    }
    return (p->present = allocate(series, 1)) != NULL;
}

static PyObject *write_planned(const plan *p)
{
    Py_ssize_t space = 0, lines = measure(p, &space);
    if (lines < 0)
        return PyErr_NoMemory();
    if (lines == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    PyObject *page = PyBytes_FromStringAndSize(NULL, space); /* nobody else knows it yet, so it may be written to */
    if (!page)
        return NULL;
    char *start = PyBytes_AS_STRING(page), *end;
    if (lines <= FEW_LINES)
        end = write_family(start, p);
    else {
        Py_BEGIN_ALLOW_THREADS;
        end = write_family(start, p);
        Py_END_ALLOW_THREADS;
    }
    _PyBytes_Resize(&page, end - start);
    return page;
}

static PyObject *encode(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    plan p = {0};
    Py_buffer view = {0};
    PyObject *page = plan_family(&p, &view, args, nargs) ? write_planned(&p) : NULL;
    if (view.obj)
        PyBuffer_Release(&view);
    PyMem_Free(p.pres);
    PyMem_Free(p.posts);
    PyMem_Free(p.names);
    PyMem_Free(p.tails);
    PyMem_Free(p.present);
    PyMem_Free(p.escaped);
    return page;
}

static PyObject *number(PyObject *Py_UNUSED(module), PyObject *object)
{
    char space[NUMBER_SPACE];
    double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred())
        return NULL;
    return PyBytes_FromStringAndSize(space, write_number(space, value) - space);
}

/* ---- The module ----------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(encode_doc, "encode(head, pres, posts, names, values, bounds, width, tails=(), /)\n--\n\n"
                         "The head and the lines of one family; nothing at all when it has no series. See _lines_py.");
PyDoc_STRVAR(number_doc, "number(value, /)\n--\n\nThe shortest digits that read back as value. See _lines_py.");

static PyMethodDef methods[] = {
    {"encode", (PyCFunction)(void (*)(void))encode, METH_FASTCALL, encode_doc},
    {"number", number, METH_O, number_doc},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    PyObject *all = Py_BuildValue("[ss]", "encode", "number");
    if (!all)
        return -1;
    int failed = PyModule_AddObjectRef(module, "__all__", all);
    Py_DECREF(all);
    return failed;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef lines_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "rkmetrics._lines",
    .m_doc = "Sample lines from columns of numbers, compiled.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__lines(void)
{
    return PyModuleDef_Init(&lines_module);
}
