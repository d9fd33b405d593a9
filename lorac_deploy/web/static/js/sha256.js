// SHA-256 (FIPS 180-4). Browsers offer it on https and on localhost only; elsewhere this computes it.

/** The hex digest of bytes. */
export async function sha256(bytes) {
  if (globalThis.crypto?.subtle) return hex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
  return sha256Here(bytes);
}

const primes = (count) => {
  const found = [];
  for (let n = 2; found.length < count; n++) if (found.every((p) => n % p)) found.push(n);
  return found;
};

/** The first 32 bits behind the point of a root. */
function fraction(prime, root) {
  // The root as a whole number, so that no bit is lost: floor(prime^(1/root) * 2^32).
  const target = BigInt(prime) << BigInt(32 * root);
  let [low, high] = [0n, 1n << 40n];
  while (low < high) {
    const middle = (low + high + 1n) >> 1n;
    if (middle ** BigInt(root) <= target) low = middle;
    else high = middle - 1n;
  }
  return Number(low & 0xffffffffn);
}

const START = primes(8).map((p) => fraction(p, 2));
const ROUNDS = Uint32Array.from(primes(64), (p) => fraction(p, 3));

/** The same digest without the browser's help, for plain http. */
export function sha256Here(bytes) {
  const state = Uint32Array.from(START);
  const whole = bytes.length - (bytes.length % 64);
  const schedule = new Uint32Array(64);
  for (let at = 0; at < whole; at += 64) compress(state, bytes, at, schedule);
  const rest = bytes.length - whole;
  const tail = new Uint8Array(rest < 56 ? 64 : 128);
  tail.set(bytes.subarray(whole));
  tail[rest] = 0x80;
  new DataView(tail.buffer).setBigUint64(tail.length - 8, BigInt(bytes.length) * 8n);
  for (let at = 0; at < tail.length; at += 64) compress(state, tail, at, schedule);
  const digest = new DataView(new ArrayBuffer(32));
  state.forEach((word, i) => digest.setUint32(4 * i, word));
  return hex(new Uint8Array(digest.buffer));
}

const turned = (x, n) => (x >>> n) | (x << (32 - n));

function compress(state, bytes, at, w) {
  for (let i = 0; i < 16; i++) {
    const k = at + 4 * i;
    w[i] = (bytes[k] << 24) | (bytes[k + 1] << 16) | (bytes[k + 2] << 8) | bytes[k + 3];
  }
  for (let i = 16; i < 64; i++) {
    const [x, y] = [w[i - 15], w[i - 2]];
    const first = turned(x, 7) ^ turned(x, 18) ^ (x >>> 3);
    const second = turned(y, 17) ^ turned(y, 19) ^ (y >>> 10);
    w[i] = (w[i - 16] + first + w[i - 7] + second) | 0;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let i = 0; i < 64; i++) {
    const big = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25);
    const t = (h + big + ((e & f) ^ (~e & g)) + ROUNDS[i] + w[i]) | 0;
    const u = ((turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    [h, g, f, e, d, c, b, a] = [g, f, e, (d + t) | 0, c, b, a, (t + u) | 0];
  }
  [a, b, c, d, e, f, g, h].forEach((value, i) => (state[i] += value));
}

function hex(bytes) {
  return [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
}
