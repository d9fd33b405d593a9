// Random numbers as numpy draws them: SeedSequence, PCG64 and Generator.permutation.
// The same seed gives the same order of images as `lorac-finetune`.
// Sources: M. E. O'Neill, "PCG" (2014), XSL RR 128/64; numpy.random.SeedSequence.

const MASK64 = (1n << 64n) - 1n;
const MASK128 = (1n << 128n) - 1n;
const PCG_MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL = 4;
const HASH_A = { start: 0x43b0d7e5, factor: 0x931e8875 };
const HASH_B = { start: 0x8b51f9dd, factor: 0x58f38ded };
const MIX_LEFT = 0xca01f9dd;
const MIX_RIGHT = 0x4973f715;

/** 32-bit words of a whole number, the lowest first. */
function words(number) {
  const found = [];
  for (let rest = BigInt(number); rest > 0n; rest >>= 32n) found.push(Number(rest & 0xffffffffn));
  return found.length ? found : [0];
}

/** A hash whose constant changes with every use. */
function hasher({ start, factor }) {
  let constant = start;
  return (value) => {
    const mixed = value ^ constant;
    constant = Math.imul(constant, factor);
    const spread = Math.imul(mixed, constant);
    return (spread ^ (spread >>> 16)) >>> 0;
  };
}

function mixed(x, y) {
  const value = (Math.imul(MIX_LEFT, x) - Math.imul(MIX_RIGHT, y)) | 0;
  return (value ^ (value >>> 16)) >>> 0;
}

/** Four 64-bit numbers from whole numbers, as SeedSequence(entropy).generate_state(4, uint64) gives them. */
export function seedState(entropy) {
  const given = entropy.flatMap(words);
  const hash = hasher(HASH_A);
  const pool = Array.from({ length: POOL }, (_, i) => hash(given[i] ?? 0));
  for (let from = 0; from < POOL; from++) {
    for (let to = 0; to < POOL; to++) if (from !== to) pool[to] = mixed(pool[to], hash(pool[from]));
  }
  for (const word of given.slice(POOL)) {
    for (let to = 0; to < POOL; to++) pool[to] = mixed(pool[to], hash(word));
  }
  const last = hasher(HASH_B);
  const out = Array.from({ length: 8 }, (_, i) => BigInt(last(pool[i % POOL])));
  return [0, 2, 4, 6].map((i) => out[i] | (out[i + 1] << 32n));
}

/** numpy.random.default_rng(seed), for a whole number or a list of them. */
export class Generator {
  #state = 0n;
  #increment;
  #half = null; // the upper half of the last number, if only its lower half was taken

  constructor(seed) {
    const [high, low, streamHigh, streamLow] = seedState(Array.isArray(seed) ? seed : [seed]);
    this.#increment = ((((streamHigh << 64n) | streamLow) << 1n) | 1n) & MASK128;
    this.#step();
    this.#state = (this.#state + ((high << 64n) | low)) & MASK128;
    this.#step();
  }

  #step() {
    this.#state = (this.#state * PCG_MULTIPLIER + this.#increment) & MASK128;
  }

  #next64() {
    this.#step();
    const turn = this.#state >> 122n;
    const value = (this.#state >> 64n) ^ (this.#state & MASK64);
    return ((value >> turn) | (value << (64n - turn))) & MASK64;
  }

  #next32() {
    if (this.#half !== null) {
      const kept = this.#half;
      this.#half = null;
      return kept;
    }
    const value = this.#next64();
    this.#half = value >> 32n;
    return value & 0xffffffffn;
  }

  /** A whole number from 0 to `largest` (at most 2^32 - 1), all equally likely: too large ones are drawn again. */
  upTo(largest) {
    const mask = 2 ** (32 - Math.clz32(largest)) - 1;
    for (;;) {
      const value = (Number(this.#next32()) & mask) >>> 0;
      if (value <= largest) return value;
    }
  }

  /** The numbers 0 to count - 1 in random order. */
  permutation(count) {
    const order = Array.from({ length: count }, (_, i) => i);
    for (let i = count - 1; i > 0; i--) {
      const j = this.upTo(i);
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }
}
