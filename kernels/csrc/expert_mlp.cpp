// A bank of expert feed-forwards, forward and backward, on a CPU with AVX-512: see kernels/native.py, which calls it.
//
// An expert's rows go through phases, each a set of items that its team of threads claims one after another:
//
//     forward     gather x | h = x W_in^T + b_in, a = f(h) | y = a W_out^T + b_out
//     backward    gather dy and x | da = dy W_out, with h: a, dh, <da, a> | dx = dh W_in, dW_out, dW_in, the rest
//
// An item of a product is a panel of 32 columns: its thread packs the panel of weights once and takes all rows through
// it, so weights are neither packed twice nor kept packed. What follows a product happens on its tile. Experts with
// many rows have all threads as their team; the others have one thread each, the largest first. The sum at the tokens
// is in the order of the rows. All sums have an order of their own, whatever the threads: results are deterministic.
//
// No torch header, and no OpenMP library is linked: the symbols are those that `import torch` has loaded, so that
// threads are torch's and torch.set_num_threads counts.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "tile.h"

namespace gatewright {

// As kernels/native.py fills it: native.Problem. Pointers may be null where the comment says so.
struct Problem {
    int64_t bfloat16, activation, threads, num_experts, dim, hidden, num_tokens, num_rows, combine;
    const int64_t* counts;  // [E]
    const int64_t* token;   // [N], or null: row n of x
    const float* weight;    // [N], or null: 1
    const void *x, *w_in, *w_out, *b_in, *b_out;  // b_in, b_out: or null
    int64_t b_in_stride, b_out_stride;
    void* h;         // [N, H']; forward: written, or null
    int64_t* order;  // [N], rows by token: forward writes it, or null; backward reads it
    void* out;       // [T, D] or [N, D]
    const void* dy;
    void *dx, *dw_in, *dw_out, *db_in, *db_out;  // or null: not wanted
    float* dweight;                              // [N], or null
    char* scratch;
};

// Cuts the caller's scratch memory into aligned pieces; without memory it only adds up what is needed.
struct Scratch {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(long count) {
        T* piece = base ? (T*)(base + used) : nullptr;
        used += ceil_div(count * sizeof(T), 64) * 64;
        return piece;
    }
};

// Words from row to row: a cache line more than needed, so that rows do not fall into the same sets.
inline long padded_stride(long words) { return ceil_div(words, LANES) * LANES + LANES; }

struct Team {
    bool shared;
    long size;
    int* item;

    long claim() { return shared ? __atomic_fetch_add(item, 1, __ATOMIC_RELAXED) : (*item)++; }
    void end_phase() {
        item++;
        if (shared) {
#pragma omp barrier
        }
    }
};
constexpr int PHASES = 3;
constexpr long ROW_CHUNK = 28;

// A sum that carries its rounding error along.
struct Sum {
    Vec total = _mm512_setzero_ps(), error = _mm512_setzero_ps();
    void add(Vec value) {
        value = _mm512_sub_ps(value, error);
        Vec next = _mm512_add_ps(total, value);
        error = _mm512_sub_ps(_mm512_sub_ps(next, total), value);
        total = next;
    }
};

// One call: the shapes, and where everything lies in the scratch memory.
template <class T>
struct Bank {
    const Problem& p;
    const bool backward, gated;
    const long dim, hidden, width;  // width: of h, H or 2H
    const long dim_words, hidden_words, width_words, dim_stride, hidden_stride, width_stride;
    const long hidden_panels;
    const Cut dim_cut;
    T* rows_ND;  // what is summed at the tokens
    int* items;  // [E][PHASES], and one of experts, one of tokens
    int64_t *ends, *order;
    bool one_row_each;  // no token has two rows: results need no sum
    size_t bytes;

    Bank(const Problem& problem, bool is_backward)
        : p(problem), backward(is_backward), gated(is_gated((Activation)p.activation)), dim(p.dim), hidden(p.hidden),
          width(hidden * (1 + gated)), dim_words(words_of(dim)), hidden_words(words_of(hidden)),
          width_words(words_of(width)), dim_stride(padded_stride(dim_words)),
          hidden_stride(padded_stride(hidden_words)), width_stride(padded_stride(width_words)),
          hidden_panels(ceil_div(hidden, NR)), dim_cut(dim, 1) {
        long most_shared = 0, most_own = 0;
        for (long e = 0; e < p.num_experts; e++) {
            long& most = is_shared(e) ? most_shared : most_own;
            most = std::max(most, (long)p.counts[e]);
        }
        Scratch scratch{p.scratch};
        items = scratch.take<int>(p.num_experts * PHASES + 2);
        ends = scratch.take<int64_t>(p.num_tokens + 1);
        order = p.order ? p.order : scratch.take<int64_t>(p.num_rows);
        rows_ND = scratch.take<T>(sums_at_tokens() ? p.num_rows * dim : 0);
        panels = scratch.take<Word>(p.threads * panel_words());
        teams = scratch.used;
        // experts that have all threads come before the others, in the same memory
        Scratch shared{nullptr}, own{nullptr};
        take_rows(shared, most_shared);
        take_rows(own, most_own);
        own_bytes = own.used;
        bytes = teams + std::max(shared.used, own.used * p.threads);
    }

    static long words_of(long numbers) { return ceil_div(numbers, PER_WORD<T>); }
    // A team of all threads where one alone could keep the others waiting at the end.
    bool is_shared(long e) const { return p.threads > 1 && p.counts[e] * 16 * p.threads > p.num_rows; }
    bool sums_at_tokens() const { return backward ? p.token && p.dx : p.combine; }
    T* result() const { return (T*)(backward ? p.dx : p.out); }
    Word* panel(long thread) const { return panels + thread * panel_words(); }
    // Of 16 columns and n rows; odd in cache lines for the same reason as padded_stride.
    static long column_panel(long n) { return (words_of(n) | 1) * LANES; }

    // The operands of one expert's products.
    struct Rows {
        Word *x, *a;                                             // forward, as rows
        Word *dy, *dh, *dy_panels, *x_panels, *a_panels, *dh_panels;  // backward, as rows; summed over rows, as columns
        float* dots;                                             // [hidden panels][n] parts of <da, a>
    };
    Rows take_rows(Scratch& scratch, long n) const {
        Rows rows{};
        if (!backward) {
            rows.x = scratch.take<Word>(n * dim_stride);
            rows.a = scratch.take<Word>(n * hidden_stride);
            return rows;
        }
        const long right_panels = hidden_panels * words_of(n) * NR;
        rows.dy = scratch.take<Word>(n * dim_stride);
        rows.dh = scratch.take<Word>(n * width_stride);
        rows.dy_panels = scratch.take<Word>(p.dw_out ? dim_cut.parts * column_panel(n) : 0);
        rows.x_panels = scratch.take<Word>(p.dw_in ? dim_cut.parts * column_panel(n) : 0);
        rows.a_panels = scratch.take<Word>(p.dw_out ? right_panels : 0);
        rows.dh_panels = scratch.take<Word>(p.dw_in ? (1 + gated) * right_panels : 0);
        rows.dots = scratch.take<float>(p.dweight ? hidden_panels * n : 0);
        return rows;
    }
    Rows rows_of(const Team& team, long thread, long n) const {
        Scratch scratch{p.scratch + teams + (team.shared ? 0 : thread * own_bytes)};
        return take_rows(scratch, n);
    }

    // Rows by token, stable (a counting sort), and where each token's end.
    void sort_by_token() {
        one_row_each = true;
        if (!sums_at_tokens() && !(p.token && p.order)) return;
        std::fill(ends, ends + p.num_tokens + 1, 0);
        for (long row = 0; row < p.num_rows; row++) one_row_each &= ++ends[p.token[row] + 1] <= 1;
        for (long t = 0; t < p.num_tokens; t++) ends[t + 1] += ends[t];
        if (backward) {
            for (long t = 0; t < p.num_tokens; t++) ends[t] = ends[t + 1];
            return;
        }
        for (long row = 0; row < p.num_rows; row++) order[ends[p.token[row]]++] = row;
    }

    // Where row n of the result of the last product goes.
    T* result_row(long row) const {
        if (!sums_at_tokens()) return result() + row * dim;
        return one_row_each ? result() + p.token[row] * dim : rows_ND + row * dim;
    }

    // Forward: times the weights. Backward: they are in already.
    void sum_at_tokens(long begin, long end) const {
        for (long t = begin; t < end; t++) {
            const long low = t ? ends[t - 1] : 0, high = ends[t];
            T* to = result() + t * dim;
            if (high > low && one_row_each) continue;
            for (long c = 0; c < dim; c += LANES) {
                const __mmask16 mask = lanes(dim - c);
                Vec sum = _mm512_setzero_ps();
                for (long i = low; i < high; i++) {
                    const float weight = backward || !p.weight ? 1 : p.weight[order[i]];
                    sum = _mm512_fmadd_ps(set(weight), load(rows_ND + order[i] * dim + c, mask), sum);
                }
                store(to + c, mask, sum);
            }
        }
    }

   private:
    long panel_words() const { return (std::max(dim_words, width_words) + LANES) * NR; }
    Word* panels;
    size_t teams, own_bytes;
};

// Rows lie far apart, so that no hardware sees which comes next. In assembly, because GCC takes a function of nothing
// but __builtin_prefetch for one without effect, and drops the call.
template <class T>
inline void fetch(const T* from) {
    asm volatile("prefetcht0 %0" : : "m"(*from));
    if (sizeof(T) == 4) asm volatile("prefetcht0 %0" : : "m"(from[LANES]));
}
template <class T>
inline void fetch_to_write(const T* to) {
    asm volatile("prefetchw %0" : : "m"(*to));
    if (sizeof(T) == 4) asm volatile("prefetchw %0" : : "m"(to[LANES]));
}

// The weights of a panel, `rows` pieces of `bytes` that lie `stride` bytes apart. While one panel is multiplied those
// of the next are fetched, a share with every tile: the weights of many experts come from memory.
struct Weights {
    const char* from;
    long stride, rows, bytes;

    template <class T>
    static Weights of_rows(const T* from, long rows, long width) {
        return {(const char*)from, 64, std::max(rows, 0L) * width * (long)sizeof(T) / 64, 64};
    }
    template <class T>
    static Weights of_columns(const T* from, long height, long width, long columns) {
        return {(const char*)from, width * (long)sizeof(T), columns > 0 ? height : 0, NR * (long)sizeof(T)};
    }
    Weights beyond(long more) const { return {from + more, stride, rows, bytes}; }
    void fetch(long begin, long count, long n) const {
        for (long row = rows * begin / n; row < rows * (begin + count) / n; row++) {
            for (long byte = 0; byte < bytes; byte += 64) {
                asm volatile("prefetcht1 %0" : : "m"(from[row * stride + byte]));
            }
        }
    }
};

// One product: the rows (or columns) of the left side, a stride apart, times the packed panel. `ahead(first row, number
// of rows)` asks for the memory that will be needed afterwards, `then(the same, tile)` is what happens to the result.
template <class T, bool COLUMNS, class Ahead, class Then>
inline void product(
    const Cut& cut, const Word* left, long stride, const Word* right, long words, Ahead ahead, Then then) {
    Tile tile;
    for (long part = 0; part < cut.parts; part++) {
        const long begin = cut.begin(part), rows = cut.size(part);
        ahead(begin, rows);
        multiply_rows<T, COLUMNS>(rows, left + (COLUMNS ? part : begin) * stride, stride, right, words, tile);
        then(begin, rows, tile);
    }
}

// Row n of `from` (at the token, or as it is), as a row of words with the last one filled up with 0.
template <class T>
inline void copy_row(const T* from, long width, Word* to) {
    to[ceil_div(width, PER_WORD<T>) - 1] = 0;
    std::memcpy(to, from, width * sizeof(T));
}

// `count` rows, those of a word beside each other, into the panels of columns.
template <class T>
inline void copy_columns(const T* const* from, long count, const Cut& cut, long panel, Word* to) {
    for (long part = 0; part < cut.parts; part++) {
        const long at = cut.begin(part);
        const __mmask16 mask = lanes(cut.size(part));
        Word* word = to + part * panel;
        for (long row = 0; row < count; row += PER_WORD<T>) {
            const T* second = PER_WORD<T> == 2 && row + 1 < count ? from[row + 1] + at : nullptr;
            _mm512_store_si512(word, pair(from[row] + at, second, mask));
            word += LANES;
        }
    }
}

template <class T, Activation F>
void forward(const Bank<T>& bank, Team team, long e, long low, Word* panel, const typename Bank<T>::Rows& rows) {
    const Problem& p = bank.p;
    const long n = p.counts[e], dim = bank.dim, hidden = bank.hidden, width = bank.width;
    const T *x = (const T*)p.x, *w_in = (const T*)p.w_in + e * width * dim;
    const T* w_out = (const T*)p.w_out + e * dim * hidden;
    const T* b_in = p.b_in ? (const T*)p.b_in + e * p.b_in_stride : nullptr;
    const T* b_out = p.b_out ? (const T*)p.b_out + e * p.b_out_stride : nullptr;
    const Cut cut(n, 1);

    for (long item; (item = team.claim()) < ceil_div(n, ROW_CHUNK);) {
        for (long row = item * ROW_CHUNK; row < std::min(n, (item + 1) * ROW_CHUNK); row++) {
            copy_row(x + (p.token ? p.token[low + row] : low + row) * dim, dim, rows.x + row * bank.dim_stride);
            rows.a[row * bank.hidden_stride + bank.hidden_words - 1] = 0;
        }
    }
    team.end_phase();

    // a panel holds 32 columns of h, or 16 of the gate and the 16 that it gates
    constexpr bool GATED = is_gated(F);
    constexpr long columns = GATED ? LANES : NR;
    for (long item; (item = team.claim()) < ceil_div(hidden, columns);) {
        const long first = item * columns, second = GATED ? hidden + first : first + LANES;
        const __mmask16 masks[2] = {lanes(hidden - first), lanes(GATED ? hidden - first : hidden - second)};
        const long starts[2] = {first, second};
        Vec bias[2];
        for (int half = 0; half < 2; half++) {
            const long valid = std::clamp((GATED && half ? width : hidden) - starts[half], 0L, LANES);
            pack_rows(w_in + starts[half] * dim, dim, valid, dim, panel + half * LANES);
            bias[half] = b_in ? load(b_in + starts[half], masks[half]) : _mm512_setzero_ps();
        }
        const long next = first + team.size * columns;
        const Weights weights = Weights::of_rows(w_in + next * dim, std::min(columns, hidden - next), dim);
        auto ahead = [&](long begin, long count) {
            weights.fetch(begin, count, n);
            if (GATED) weights.beyond(hidden * dim * sizeof(T)).fetch(begin, count, n);
            for (long row = begin; p.h && row < begin + count; row++) {
                const T* h = (T*)p.h + (low + row) * width;
                fetch_to_write(h + first);
                if (GATED) fetch_to_write(h + second);
            }
        };
        auto then = [&](long begin, long count, const Tile& tile) {
            for (long r = 0; r < count; r++) {
                T* a = (T*)(rows.a + (begin + r) * bank.hidden_stride) + first;
                Vec h[2];
#pragma GCC unroll 2  // arrays of vectors stay in registers only where no loop is left over them
                for (int half = 0; half < 2; half++) {
                    // rounded as it is kept, so that backward sees what forward saw
                    h[half] = rounded<T>(_mm512_add_ps(_mm512_load_ps(tile.at[r] + half * LANES), bias[half]));
                    if (p.h) store((T*)p.h + (low + begin + r) * width + starts[half], masks[half], h[half]);
                }
                const Vec value = activate<of_gate(F), false>(h[0]).value;
                if constexpr (GATED) {
                    store(a, masks[0], _mm512_mul_ps(value, h[1]));
                } else {
                    store(a, masks[0], value);
                    store(a + LANES, masks[1], activate<F, false>(h[1]).value);
                }
            }
        };
        product<T, false>(cut, rows.x, bank.dim_stride, panel, bank.dim_words, ahead, then);
    }
    team.end_phase();

    for (long item; (item = team.claim()) < ceil_div(dim, NR);) {
        for (int half = 0; half < 2; half++) {
            const long start = item * NR + half * LANES, valid = std::clamp(dim - start, 0L, LANES);
            pack_rows(w_out + start * hidden, hidden, valid, hidden, panel + half * LANES);
        }
        const long words = bank.hidden_words;
        const long next = (item + team.size) * NR;
        const Weights weights = Weights::of_rows(w_out + next * hidden, std::min(NR, dim - next), hidden);
        auto ahead = [&](long begin, long count) {
            weights.fetch(begin, count, n);
            for (long r = 0; r < count; r++) fetch_to_write(bank.result_row(low + begin + r) + item * NR);
        };
        auto then = [&](long begin, long count, const Tile& tile) {
            for (long r = 0; r < count; r++) {
                const long row = low + begin + r;
                // where rows are summed at the tokens, the weights come in there
                const bool weighted = p.weight && (!p.combine || bank.one_row_each);
                const Vec weight = set(weighted ? p.weight[row] : 1);
                T* y = bank.result_row(row);
                for (long c = item * NR; c < std::min(dim, (item + 1) * NR); c += LANES) {
                    Vec value = _mm512_load_ps(tile.at[r] + c - item * NR);
                    if (b_out) value = _mm512_add_ps(value, load(b_out + c, lanes(dim - c)));
                    store(y + c, lanes(dim - c), _mm512_mul_ps(value, weight));
                }
            }
        };
        product<T, false>(cut, rows.a, bank.hidden_stride, panel, words, ahead, then);
    }
    team.end_phase();
}

// The parts of <da, a> of each row, and <dy, b_out>.
template <class T>
void finish_dweight(const Bank<T>& bank, const T* b_out, const float* dots, const Word* dy, long n, float* dweight) {
    for (long row = 0; row < n; row++) {
        float sum = 0;
        for (long item = 0; item < bank.hidden_panels; item++) sum += dots[item * n + row];
        if (b_out) {
            Vec dot = _mm512_setzero_ps();
            for (long c = 0; c < bank.dim; c += LANES) {
                const __mmask16 mask = lanes(bank.dim - c);
                const Vec value = load((const T*)(dy + row * bank.dim_stride) + c, mask);
                dot = _mm512_fmadd_ps(value, load(b_out + c, mask), dot);
            }
            sum += _mm512_reduce_add_ps(dot);
        }
        dweight[row] = sum;
    }
}

template <class T>
void finish_db_out(const Bank<T>& bank, const float* weight, const Word* dy, long n, T* db_out) {
    for (long c = 0; c < bank.dim; c += LANES) {
        const __mmask16 mask = lanes(bank.dim - c);
        Sum sum;
        for (long row = 0; row < n; row++) {
            const Vec value = load((const T*)(dy + row * bank.dim_stride) + c, mask);
            sum.add(_mm512_mul_ps(value, set(weight ? weight[row] : 1)));
        }
        store(db_out + c, mask, sum.total);
    }
}

template <class T, Activation F>
void backward(const Bank<T>& bank, Team team, long e, long low, Word* panel, const typename Bank<T>::Rows& rows) {
    const Problem& p = bank.p;
    constexpr bool GATED = is_gated(F);
    const long n = p.counts[e], dim = bank.dim, hidden = bank.hidden, width = bank.width;
    const long words = bank.words_of(n), column_panel = bank.column_panel(n);
    const T *x = (const T*)p.x, *dy = (const T*)p.dy, *h_NH = (const T*)p.h + low * width;
    const T *w_in = (const T*)p.w_in + e * width * dim, *w_out = (const T*)p.w_out + e * dim * hidden;
    const float* weight = p.weight ? p.weight + low : nullptr;

    // ROW_CHUNK is even: a word's rows are in one item
    for (long item; (item = team.claim()) < ceil_div(n, ROW_CHUNK);) {
        const long first = item * ROW_CHUNK, count = std::min(ROW_CHUNK, n - first);
        const T *dy_rows[ROW_CHUNK], *x_rows[ROW_CHUNK];
        for (long i = 0; i < count; i++) {
            const long row = low + first + i, source = p.token ? p.token[row] : row;
            dy_rows[i] = dy + (p.combine ? source : row) * dim;
            x_rows[i] = x + source * dim;
            copy_row(dy_rows[i], dim, rows.dy + (first + i) * bank.dim_stride);
            rows.dh[(first + i) * bank.width_stride + bank.width_words - 1] = 0;
        }
        const long at = first / PER_WORD<T> * LANES;
        if (p.dw_out) copy_columns(dy_rows, count, bank.dim_cut, column_panel, rows.dy_panels + at);
        if (p.dw_in) copy_columns(x_rows, count, bank.dim_cut, column_panel, rows.x_panels + at);
    }
    team.end_phase();

    // tiles start at whole words of the products that sum over rows
    const Cut cut(n, PER_WORD<T>);
    for (long item; (item = team.claim()) < bank.hidden_panels;) {
        const long first = item * NR;
        pack_columns(w_out + first, hidden, dim, hidden - first, panel);
        const __mmask16 masks[2] = {lanes(hidden - first), lanes(hidden - first - LANES)};
        Sum db[1 + GATED][2];
        const long next = first + team.size * NR;
        const Weights weights = Weights::of_columns(w_out + next, dim, hidden, hidden - next);
        auto ahead = [&](long begin, long count) {
            weights.fetch(begin, count, n);
            for (long row = begin; row < begin + count; row++) {
                for (int part = 0; part <= GATED; part++) {
                    fetch(h_NH + row * width + part * hidden + first);
                    fetch_to_write((T*)(rows.dh + row * bank.width_stride) + part * hidden + first);
                }
            }
        };
        auto then = [&](long begin, long count, const Tile& tile) {
            alignas(64) T a[MR][NR], dh[1 + GATED][MR][NR];
            Vec sum[1 + GATED][2] = {};
            for (long r = 0; r < count; r++) {
                const T* h = h_NH + (begin + r) * width + first;
                T* dh_row = (T*)(rows.dh + (begin + r) * bank.width_stride) + first;
                const Vec w = set(weight ? weight[begin + r] : 1);
                Vec dot = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const long c = half * LANES;
                    const __mmask16 mask = masks[half];
                    const Vec da = _mm512_load_ps(tile.at[r] + c), weighted = _mm512_mul_ps(da, w);
                    const ValueAndSlope f = activate<of_gate(F), true>(load(h + c, mask));
                    Vec value = f.value, gradient[2] = {_mm512_mul_ps(weighted, f.slope)};
                    if constexpr (GATED) {
                        const Vec up = load(h + hidden + c, mask);
                        value = _mm512_mul_ps(f.value, up);
                        gradient[0] = _mm512_mul_ps(gradient[0], up);
                        gradient[1] = _mm512_mul_ps(weighted, f.value);
                    }
                    dot = _mm512_fmadd_ps(da, value, dot);
                    store(a[r] + c, ALL, _mm512_mul_ps(value, w));
#pragma GCC unroll 2
                    for (int part = 0; part <= GATED; part++) {
                        store(dh[part][r] + c, ALL, gradient[part]);
                        store(dh_row + part * hidden + c, mask, gradient[part]);
                        sum[part][half] = _mm512_add_ps(sum[part][half], gradient[part]);
                    }
                }
                if (p.dweight) rows.dots[item * n + begin + r] = _mm512_reduce_add_ps(dot);
            }
            const long at = (item * words + begin / PER_WORD<T>) * NR;
            if (p.dw_out) pack_columns(a[0], NR, count, NR, rows.a_panels + at);
#pragma GCC unroll 2
            for (int part = 0; part <= GATED; part++) {
                const long other_half = part * bank.hidden_panels * words * NR;
                if (p.dw_in) pack_columns(dh[part][0], NR, count, NR, rows.dh_panels + other_half + at);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) db[part][half].add(sum[part][half]);
            }
        };
        product<T, false>(cut, rows.dy, bank.dim_stride, panel, bank.dim_words, ahead, then);
        for (int part = 0; part <= GATED && p.db_in; part++) {
            for (long c = first; c < std::min(hidden, first + NR); c += LANES) {
                const Vec total = db[part][(c - first) / LANES].total;
                store((T*)p.db_in + e * width + part * hidden + c, lanes(hidden - c), total);
            }
        }
    }
    team.end_phase();

    const long for_x = p.dx ? ceil_div(dim, NR) : 0, for_w_out = p.dw_out ? bank.hidden_panels : 0;
    const long for_w_in = p.dw_in ? (1 + GATED) * bank.hidden_panels : 0;
    for (long item; (item = team.claim()) < for_x + for_w_out + for_w_in + 2;) {
        if (item < for_x) {
            const long first = item * NR;
            pack_columns(w_in + first, dim, width, dim - first, panel);
            const Cut any(n, 1);
            const long next = first + team.size * NR;
            const Weights weights = Weights::of_columns(w_in + next, width, dim, dim - next);
            auto ahead = [&](long begin, long count) {
                weights.fetch(begin, count, n);
                for (long r = 0; r < count; r++) fetch_to_write(bank.result_row(low + begin + r) + first);
            };
            auto then = [&](long begin, long count, const Tile& tile) {
                for (long r = 0; r < count; r++) {
                    T* dx = bank.result_row(low + begin + r);
                    for (long c = first; c < std::min(dim, first + NR); c += LANES) {
                        store(dx + c, lanes(dim - c), _mm512_load_ps(tile.at[r] + c - first));
                    }
                }
            };
            product<T, false>(any, rows.dh, bank.width_stride, panel, bank.width_words, ahead, then);
        } else if (item < for_x + for_w_out) {
            const long panel_of_a = item - for_x, first = panel_of_a * NR;
            const Word* right = rows.a_panels + panel_of_a * words * NR;
            T* dw = (T*)p.dw_out + e * dim * hidden;
            auto ahead = [&](long begin, long count) {
                for (long r = begin; r < begin + count; r++) fetch_to_write(dw + r * hidden + first);
            };
            auto then = [&](long begin, long count, const Tile& tile) {
                for (long r = 0; r < count; r++) {
                    for (long c = first; c < std::min(hidden, first + NR); c += LANES) {
                        store(dw + (begin + r) * hidden + c, lanes(hidden - c), _mm512_load_ps(tile.at[r] + c - first));
                    }
                }
            };
            product<T, true>(bank.dim_cut, rows.dy_panels, column_panel, right, words, ahead, then);
        } else if (item < for_x + for_w_out + for_w_in) {
            const long panel_of_dh = item - for_x - for_w_out, part = panel_of_dh / bank.hidden_panels;
            const long first = panel_of_dh % bank.hidden_panels * NR;
            const Word* right = rows.dh_panels + panel_of_dh * words * NR;
            T* dw = (T*)p.dw_in + (e * width + part * hidden) * dim;
            auto ahead = [&](long begin, long) {
                for (long r = first; r < std::min(hidden, first + NR); r++) fetch_to_write(dw + r * dim + begin);
            };
            auto then = [&](long begin, long count, const Tile& tile) {
                // The tile is [dim][hidden], the gradient the other way round. Whole vectors, where the row has room:
                // what is too much belongs to the next tile, which comes after.
                const __mmask16 mask = begin + LANES <= dim ? ALL : lanes(count);
                for (long c = first; c < std::min(hidden, first + NR); c += LANES) {
                    __m512i turned[LANES];
                    for (long r = 0; r < LANES; r++) {
                        turned[r] = r < count ? _mm512_load_si512(tile.at[r] + c - first) : _mm512_setzero_si512();
                    }
                    transpose(turned);
                    for (long r = 0; r < std::min(LANES, hidden - c); r++) {
                        store(dw + (c + r) * dim + begin, mask, _mm512_castsi512_ps(turned[r]));
                    }
                }
            };
            product<T, true>(bank.dim_cut, rows.x_panels, column_panel, right, words, ahead, then);
        } else {
            const T* b_out = p.b_out ? (const T*)p.b_out + e * p.b_out_stride : nullptr;
            const bool last = item > for_x + for_w_out + for_w_in;
            if (last && p.dweight) finish_dweight(bank, b_out, rows.dots, rows.dy, n, p.dweight + low);
            if (!last && p.db_out) finish_db_out(bank, weight, rows.dy, n, (T*)p.db_out + e * dim);
        }
    }
    team.end_phase();
}

// The gradients of an expert without rows.
template <class T>
void zero_gradients(const Bank<T>& bank, long e) {
    const Problem& p = bank.p;
    auto zero = [e](void* gradient, long size) {
        if (gradient) std::memset((T*)gradient + e * size, 0, size * sizeof(T));
    };
    zero(p.dw_in, bank.width * bank.dim);
    zero(p.dw_out, bank.dim * bank.hidden);
    zero(p.db_in, bank.width);
    zero(p.db_out, bank.dim);
}

template <class T, Activation F>
void run(const Problem& p, bool is_backward) {
    Bank<T> bank(p, is_backward);
    bank.sort_by_token();
    std::fill(bank.items, bank.items + p.num_experts * PHASES + 2, 0);
    int* const next = bank.items + p.num_experts * PHASES;
    std::vector<long> low(p.num_experts), own, shared;
    for (long e = 0, row = 0; e < p.num_experts; row += p.counts[e++]) {
        low[e] = row;
        (bank.is_shared(e) ? shared : own).push_back(e);
    }
    std::stable_sort(own.begin(), own.end(), [&](long one, long other) { return p.counts[one] > p.counts[other]; });

#pragma omp parallel num_threads(p.threads)
    {
        const long thread = omp_get_thread_num();
        auto compute = [&](long e, bool with_all) {
            Team team{with_all, with_all ? p.threads : 1, bank.items + e * PHASES};
            const auto rows = bank.rows_of(team, thread, p.counts[e]);
            if (p.counts[e] == 0) {
                if (is_backward) zero_gradients(bank, e);
            } else if (is_backward) {
                backward<T, F>(bank, team, e, low[e], bank.panel(thread), rows);
            } else {
                forward<T, F>(bank, team, e, low[e], bank.panel(thread), rows);
            }
        };
        for (long e : shared) compute(e, true);
        Team experts{p.threads > 1, p.threads, next};
        for (long i; (i = experts.claim()) < (long)own.size();) compute(own[i], false);
        experts.end_phase();
        if (bank.sums_at_tokens()) {
            constexpr long CHUNK_OF_TOKENS = 64;
            for (long i; (i = experts.claim()) * CHUNK_OF_TOKENS < p.num_tokens;) {
                bank.sum_at_tokens(i * CHUNK_OF_TOKENS, std::min(p.num_tokens, (i + 1) * CHUNK_OF_TOKENS));
            }
        }
    }
}

template <class T>
void run(const Problem& p, bool is_backward) {
    static constexpr void (*runs[])(const Problem&, bool) = {
        run<T, GELU>, run<T, GELU_TANH>, run<T, RELU>, run<T, RELU2>, run<T, SILU>, run<T, SWIGLU>, run<T, GEGLU>};
    runs[p.activation](p, is_backward);
}

// Large new results are faulted in by pages of 2 MiB instead of 4 KiB.
void advise(const void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t huge = 2 << 20;
    const uintptr_t begin = ceil_div((long)memory, huge) * huge, end = ((uintptr_t)memory + bytes) / huge * huge;
    if (memory && end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}
}  // namespace gatewright

using namespace gatewright;

#define GATEWRIGHT_EXPORT extern "C" __attribute__((visibility("default")))

// Which types this processor takes: 1 float32, 2 bfloat16. With AMX, oneDNN's bfloat16 is beyond what is possible here.
GATEWRIGHT_EXPORT int gatewright_supports() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
        return 0;
    }
    return 1 + 2 * (__builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16"));
}

// Guards against a library of other sources than the Python beside it.
GATEWRIGHT_EXPORT int gatewright_problem_bytes() { return sizeof(Problem); }

// The first row whose token is out of range, or -1.
GATEWRIGHT_EXPORT int64_t gatewright_check(const Problem* p) {
    for (long row = 0; p->token && row < p->num_rows; row++) {
        if ((uint64_t)p->token[row] >= (uint64_t)p->num_tokens) return row;
    }
    return -1;
}

GATEWRIGHT_EXPORT int64_t gatewright_scratch_bytes(const Problem* p, int is_backward) {
    return p->bfloat16 ? Bank<BFloat16>(*p, is_backward).bytes : Bank<float>(*p, is_backward).bytes;
}

GATEWRIGHT_EXPORT void gatewright_advise(const void* memory, int64_t bytes) { advise(memory, bytes); }

GATEWRIGHT_EXPORT void gatewright_expert_mlp(const Problem* p, int is_backward) {
    p->bfloat16 ? run<BFloat16>(*p, is_backward) : run<float>(*p, is_backward);
}
