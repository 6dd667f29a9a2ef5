// Philox4x32-7 for the masks of kernels/lora_linear/dropout.py: counter {column, row, 0, target}, a
// draw in each 64-bit lane of a CPU's vector and in each thread of a GPU alike.
//
// Included inside a namespace that has vw, one or several 64-bit lanes, and multiply_low(vw,
// factor), the lower halves of the lanes times a factor; no include guard and no includes of its
// own. The upper halves of lanes hold what is left of products, and are never read.

// Round keys, each in every lane.
struct RoundKeys {
  vw low[7], high[7];
};

MODXFER_INLINE RoundKeys round_keys(uint64_t seed) {
  RoundKeys keys;
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    keys.low[round] = vw{} + k0;
    keys.high[round] = vw{} + k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return keys;
}

constexpr unsigned kPhilox0 = 0xD2511F53u, kPhilox2 = 0xCD9E8D57u;

// What the draws of some columns share in all rows: words 0 and 1 after two rounds, and what the
// third makes of word 0. Until then a word depends on the column or on the row alone, but for word
// 2, which is the exclusive or of one of each.
struct ColumnDraws {
  vw word_1, word_2, product_0;
};

MODXFER_INLINE ColumnDraws column_draws(const RoundKeys& keys, unsigned target, vw column) {
  const vw product = multiply_low(column, kPhilox0);
  const vw word_1 = multiply_low(
      (product >> 32) ^ static_cast<unsigned long long>(target) ^ keys.high[0], kPhilox2);
  const vw word_0 = (word_1 >> 32) ^ keys.low[1];
  return {word_1, product ^ keys.high[1], multiply_low(word_0, kPhilox0)};
}

struct Draws {
  vw words[4];
};

// Those of a row that its first key leaves as `row_word`, row ^ the lower half of the seed.
MODXFER_INLINE Draws draws_of(const RoundKeys& keys, const ColumnDraws& columns,
                              unsigned row_word) {
  const unsigned long long row_product = static_cast<unsigned long long>(row_word) * kPhilox0;
  const vw product_2 = multiply_low(columns.word_2 ^ (row_product >> 32), kPhilox2);
  vw c0 = (product_2 >> 32) ^ columns.word_1 ^ keys.low[2], c1 = product_2;
  vw c2 = (columns.product_0 >> 32) ^ row_product ^ keys.high[2], c3 = columns.product_0;
  for (int round = 3; round < 7; ++round) {
    const vw product_0 = multiply_low(c0, kPhilox0), product_2 = multiply_low(c2, kPhilox2);
    c0 = (product_2 >> 32) ^ c1 ^ keys.low[round];
    c1 = product_2;
    c2 = (product_0 >> 32) ^ c3 ^ keys.high[round];
    c3 = product_0;
  }
  return {{c0, c1, c2, c3}};
}
