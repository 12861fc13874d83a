// SHA-256 as FIPS 180-4 defines it. The constants are the first 32 bits of the fractions of roots of primes.
#include <array>
#include <cmath>
#include <cstring>

#include "tensor.hpp"

namespace edgeq {
namespace {

using Words = std::array<uint32_t, 64>;

uint32_t rotated(uint32_t x, int n) { return x >> n | x << (32 - n); }

uint32_t fraction(long double root) { return static_cast<uint32_t>((root - std::floor(root)) * 4294967296.0L); }

std::vector<int> primes(size_t count) {
  std::vector<int> found;
  for (int n = 2; found.size() < count; n++) {
    bool prime = true;
    for (int p : found) prime = prime && n % p != 0;
    if (prime) found.push_back(n);
  }
  return found;
}

void mix(std::array<uint32_t, 8>& state, const uint8_t* block, const Words& k) {
  Words w;
  for (int i = 0; i < 16; i++)
    w[i] = uint32_t(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; i++) {
    uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + w[i - 7] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; i++) {
    uint32_t one = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
    uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
  }
  const uint32_t added[] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; i++) state[i] += added[i];
}

}  // namespace

std::string sha256(const uint8_t* data, size_t size) {
  static const std::vector<int> first = primes(64);
  static const Words k = [] {
    Words made;
    for (int i = 0; i < 64; i++) made[i] = fraction(std::cbrt(static_cast<long double>(first[i])));
    return made;
  }();
  std::array<uint32_t, 8> state;
  for (int i = 0; i < 8; i++) state[i] = fraction(std::sqrt(static_cast<long double>(first[i])));
  size_t whole = size / 64 * 64;
  for (size_t at = 0; at < whole; at += 64) mix(state, data + at, k);
  std::vector<uint8_t> rest(data + whole, data + size);
  rest.push_back(0x80);
  while (rest.size() % 64 != 56) rest.push_back(0);
  for (int shift = 56; shift >= 0; shift -= 8) rest.push_back(uint8_t(uint64_t(size) * 8 >> shift));
  for (size_t at = 0; at < rest.size(); at += 64) mix(state, rest.data() + at, k);
  std::string text;
  for (uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  return text;
}

}  // namespace edgeq
