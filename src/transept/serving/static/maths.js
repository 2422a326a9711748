// Principal components, cosine similarity, Wilson's interval and the exact binomial test.

/** Eigenvalues and vectors of a symmetric matrix, largest first, by Jacobi's rotations. */
export function eigen(matrix) {
  const n = matrix.length;
  const a = matrix.map((row) => [...row]);
  const v = a.map((_, i) => a.map((_, j) => (i === j ? 1 : 0)));
  for (let sweep = 0; sweep < 60; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) off += a[p][q] ** 2;
    if (off < 1e-22) break;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) rotate(a, v, p, q);
  }
  const order = a.map((_, i) => i).sort((i, j) => a[j][j] - a[i][i]);
  return { values: order.map((i) => a[i][i]), vectors: order.map((i) => v.map((row) => row[i])) };
}

function rotate(a, v, p, q) {
  if (Math.abs(a[p][q]) < 1e-15) return;
  const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
  const t = (Math.sign(theta) || 1) / (Math.abs(theta) + Math.hypot(theta, 1));
  const c = 1 / Math.hypot(t, 1), s = t * c;
  for (let k = 0; k < a.length; k++) [a[k][p], a[k][q]] = [c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]];
  for (let k = 0; k < a.length; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
  for (let k = 0; k < a.length; k++) [v[k][p], v[k][q]] = [c * v[k][p] - s * v[k][q], s * v[k][p] + c * v[k][q]];
}

export const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
export const cosine = (x, y) => dot(x, y) / (Math.sqrt(dot(x, x) * dot(y, y)) || 1);

/** The rows' coordinates on their first two principal components, and the share of variance that each explains. */
export function pca(rows) {
  const mean = rows[0].map((_, j) => rows.reduce((sum, row) => sum + row[j], 0) / rows.length);
  const centred = rows.map((row) => row.map((value, j) => value - mean[j]));
  // The Gram matrix has the same spectrum as the covariance and is small: there are fewer texts than dimensions.
  const { values, vectors } = eigen(centred.map((x) => centred.map((y) => dot(x, y))));
  const total = values.reduce((sum, value) => sum + Math.max(0, value), 0) || 1;
  const at = (k, i) => (vectors[k] ? vectors[k][i] * Math.sqrt(Math.max(0, values[k])) : 0);
  return { points: rows.map((_, i) => [at(0, i), at(1, i)]), shares: [0, 1].map((k) => Math.max(0, values[k] ?? 0) / total) };
}

/** Wilson's score interval for a share of `k` in `n`, at 95 % (E. B. Wilson, 1927). */
export function wilson(k, n, z = 1.959963984540054) {
  if (!n) return [0, 1];
  const p = k / n, middle = (p + z * z / (2 * n)) / (1 + z * z / n);
  const half = z / (1 + z * z / n) * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/** The probability of a result at least as far from even as `k` in `n`, where both sides are equally likely. */
export function fair(k, n) {
  const logs = [0];
  for (let i = 1; i <= n; i++) logs.push(logs[i - 1] + Math.log(i));
  const far = Math.max(k, n - k);
  let sum = 0;
  for (let i = far; i <= n; i++) sum += Math.exp(logs[n] - logs[i] - logs[n - i] - n * Math.LN2);
  return n ? Math.min(1, 2 * sum) : 1;
}
