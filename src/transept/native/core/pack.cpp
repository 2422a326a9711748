// Repacks weights from the file's rows into panels of 16 columns. Every stored number keeps its value: quants, scales and minima
// are moved, never rounded again. Block formats: the GGML quantisation formats as documented by the `gguf` package.
#include "layout.h"
#include <cstring>

namespace transept {

float half_to_float(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000u | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    else if (!mantissa) bits = sign;
    else {
        exponent = 113;
        while (!(mantissa & 1024)) { mantissa <<= 1; exponent--; }
        bits = sign | (exponent << 23) | ((mantissa & 1023) << 13);
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

namespace {

struct Block {        // one block of 32 of one column, unpacked
    uint8_t q[32];    // unsigned quants
    uint8_t d[4];     // half d, half minimum, as stored
    uint8_t sub[2];   // K kinds: the block's 6-bit scale and minimum, or two int8 scales
};

int raw_block_bytes(int kind) {
    switch (kind) {
    case F32: return 4;
    case F16: case BF16: return 2;
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q4_K: return 144;
    case Q5_K: return 176;
    case Q6_K: return 210;
    default: return 0;
    }
}

int raw_block_elements(int kind) { return layout(kind).bits == 0 ? 1 : layout(kind).blocks * KB; }

void nibbles(const uint8_t *qs, const uint8_t *high, uint8_t *q) {
    for (int j = 0; j < 16; j++) {
        q[j] = qs[j] & 15;
        q[j + 16] = qs[j] >> 4;
    }
    for (int j = 0; high && j < 32; j++) q[j] |= ((high[j / 8] >> (j % 8)) & 1) << 4;
}

void k_scales(const uint8_t *s, int b, uint8_t *sub) { // twelve bytes hold eight 6-bit scales and eight 6-bit minima
    if (b < 4) {
        sub[0] = s[b] & 63;
        sub[1] = s[b + 4] & 63;
    } else {
        sub[0] = (s[b + 4] & 15) | ((s[b - 4] >> 6) << 4);
        sub[1] = (s[b + 4] >> 4) | ((s[b] >> 6) << 4);
    }
}

Block unpack(int kind, const uint8_t *row, int block) {
    Block o = {};
    Layout l = layout(kind);
    const uint8_t *p = row + static_cast<int64_t>(block / l.blocks) * raw_block_bytes(kind);
    int b = block % l.blocks;
    switch (kind) {
    case Q4_0: std::memcpy(o.d, p, 2); nibbles(p + 2, nullptr, o.q); break;
    case Q4_1: std::memcpy(o.d, p, 4); nibbles(p + 4, nullptr, o.q); break;
    case Q5_0: std::memcpy(o.d, p, 2); nibbles(p + 6, p + 2, o.q); break;
    case Q5_1: std::memcpy(o.d, p, 4); nibbles(p + 8, p + 4, o.q); break;
    case Q8_0:
        std::memcpy(o.d, p, 2);
        for (int j = 0; j < 32; j++) o.q[j] = p[2 + j] ^ 0x80;
        break;
    case Q4_K: case Q5_K: {
        std::memcpy(o.d, p, 4);
        k_scales(p + 4, b, o.sub);
        const uint8_t *high = p + 16, *qs = p + 16 + (kind == Q5_K ? 32 : 0) + 32 * (b / 2);
        for (int j = 0; j < 32; j++) {
            o.q[j] = b % 2 ? qs[j] >> 4 : qs[j] & 15;
            if (kind == Q5_K) o.q[j] |= ((high[j] >> b) & 1) << 4;
        }
        break;
    }
    case Q6_K: {
        const uint8_t *ql = p + 64 * (b / 4) + 32 * (b % 2), *qh = p + 128 + 32 * (b / 4), *sc = p + 192;
        std::memcpy(o.d, p + 208, 2);
        std::memcpy(o.sub, sc + 2 * b, 2);
        for (int j = 0; j < 32; j++) o.q[j] = (b % 4 >= 2 ? ql[j] >> 4 : ql[j] & 15) | (((qh[j] >> (2 * (b % 4))) & 3) << 4);
        break;
    }
    default: break;
    }
    return o;
}

void place(int kind, const Block &o, int column, uint8_t *head, uint8_t *body) {
    Layout l = layout(kind);
    if (l.blocks > 1) {
        std::memcpy(head + 2 * column, o.d, 2);
        if (l.zero < 0) std::memcpy(head + 32 + 2 * column, o.d + 2, 2);
        body[column] = o.sub[0];
        body[16 + column] = o.sub[1];
    } else {
        std::memcpy(body + 2 * column, o.d, 2);
        if (l.zero < 0) std::memcpy(body + 32 + 2 * column, o.d + 2, 2);
    }
    uint8_t *planes = body + l.scales, *quants = planes + l.planes;
    for (int j = 0; j < KB; j++) {
        int g = j / 4, at = 4 * column + j % 4;
        if (l.bits == 8) quants[64 * g + at] = o.q[j];
        else quants[64 * (g / 2) + at] |= (o.q[j] & 15) << (g % 2 ? 4 : 0);
        if (l.bits == 5) planes[at] |= (o.q[j] >> 4) << g;
        if (l.bits == 6) planes[64 * (g / 4) + at] |= (o.q[j] >> 4) << (2 * (g % 4));
    }
}

} // namespace

int64_t raw_row_bytes(int kind, int k) {
    int e = raw_block_elements(kind);
    return k % e ? -1 : static_cast<int64_t>(k / e) * raw_block_bytes(kind);
}

// Panels go `stride` bytes apart, so that two matrices can be interleaved panel by panel.
void pack(int kind, int n, int k, const uint8_t *raw, uint8_t *out, int64_t stride) {
    Layout l = layout(kind);
    int64_t row = raw_row_bytes(kind, k);
    for (int p = 0; p < panels_of(n); p++) {
        uint8_t *panel = out + p * stride;
        std::memset(panel, 0, static_cast<size_t>(panel_bytes(kind, k)));
        for (int c = 0; c < NR && p * NR + c < n; c++) {
            const uint8_t *r = raw + (static_cast<int64_t>(p) * NR + c) * row;
            if (l.bits == 0) {
                int e = raw_block_bytes(kind);
                for (int j = 0; j < k; j++) std::memcpy(panel + (static_cast<int64_t>(j) * NR + c) * e, r + static_cast<int64_t>(j) * e, static_cast<size_t>(e));
                continue;
            }
            for (int b = 0; b < blocks_of(k); b++) {
                uint8_t *head = panel + static_cast<int64_t>(b / l.blocks) * (l.head + l.blocks * l.body());
                place(kind, unpack(kind, r, b), c, head, head + l.head + (b % l.blocks) * l.body());
            }
        }
    }
}

} // namespace transept
