/**
 * The forward pass of Tiny VGG.
 *
 * A stage is what a layer computes: `{ name, kind, height, width, channels, data }`. Its data is a
 * Float32Array in the order (row, column, channel): the value of channel c at row y and column x is
 * `data[(y * width + x) * channels + c]`. A dense layer's stage has one row and one column.
 */

/**
 * Computes all stages of a network for an image.
 *
 * @param layers the network, as from `readLayers`.
 * @param image the input stage, with values in [0, 1].
 * @returns the stages: the image, each convolution after its ReLU, each pooling, the dense layer
 *   after its ReLU, and the logits.
 */
export function forward(layers, image) {
  const stages = [image];
  for (const layer of layers) {
    const input = stages.at(-1);
    if (layer.kind === "convolution") {
      stages.push(convolve(input, layer));
      if (layer.pool) stages.push(maxPool(stages.at(-1), layer.pool));
    } else {
      stages.push(dense(input, layer));
    }
  }
  return stages;
}

/** Computes a 3x3 convolution with zeros around the input, adds the bias, and applies ReLU. */
export function convolve(input, { name, outputs, kernel, bias }) {
  const { height, width, channels } = input;
  // Two columns and four outputs are computed at a time, so that each value that is read from
  // memory is used several times. An odd width gets one more column, which is not kept.
  const padded = pad(input);
  const rowLength = (width + 3) * channels;
  const kernelLength = 9 * channels;
  const data = new Float32Array(height * width * outputs);
  const sums = new Float64Array(8);
  for (let y = 0; y < height; y++) {
    for (let o = 0; o < outputs; o += 4) {
      for (let x = 0; x < width; x += 2) {
        let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
        for (let dy = 0; dy < 3; dy++) {
          // The three pixels of a row of the patch lie next to one another, as in the kernel.
          let i = (y + dy) * rowLength + x * channels;
          let k = o * kernelLength + dy * 3 * channels;
          for (const end = i + 3 * channels; i < end; i++, k++) {
            const a = padded[i], b = padded[i + channels];
            const k0 = kernel[k], k1 = kernel[k + kernelLength];
            const k2 = kernel[k + 2 * kernelLength], k3 = kernel[k + 3 * kernelLength];
            a0 += a * k0; a1 += a * k1; a2 += a * k2; a3 += a * k3;
            b0 += b * k0; b1 += b * k1; b2 += b * k2; b3 += b * k3;
          }
        }
        sums[0] = a0; sums[1] = a1; sums[2] = a2; sums[3] = a3;
        sums[4] = b0; sums[5] = b1; sums[6] = b2; sums[7] = b3;
        for (let s = 0; s < 8; s++) {
          const column = x + (s >> 2), output = o + (s & 3);
          if (column < width && output < outputs) {
            data[(y * width + column) * outputs + output] = Math.max(0, sums[s] + bias[output]);
          }
        }
      }
    }
  }
  return { name, kind: "convolution", height, width, channels: outputs, data };
}

/** Surrounds a stage with zeros: a row above and below, a column before and two behind. */
function pad({ height, width, channels, data }) {
  const padded = new Float32Array((height + 2) * (width + 3) * channels);
  for (let y = 0; y < height; y++) {
    const row = data.subarray(y * width * channels, (y + 1) * width * channels);
    padded.set(row, ((y + 1) * (width + 3) + 1) * channels);
  }
  return padded;
}

/** Keeps the maximum of each square of 2x2 values; an odd last row or column is left out. */
export function maxPool(input, name) {
  const { channels, width, data } = input;
  const height = input.height >> 1, half = width >> 1;
  const pooled = new Float32Array(height * half * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < half; x++) {
      for (let c = 0; c < channels; c++) {
        const above = (2 * y * width + 2 * x) * channels + c, below = above + width * channels;
        pooled[(y * half + x) * channels + c] = Math.max(
          data[above], data[above + channels], data[below], data[below + channels]);
      }
    }
  }
  return { name, kind: "pooling", height, width: half, channels, data: pooled };
}

/** Computes a dense layer: for each output, the inputs times its weights, plus its bias. */
export function dense(input, { name, outputs, kernel, bias, relu }) {
  const inputs = input.data.length;
  const data = new Float32Array(outputs);
  for (let o = 0; o < outputs; o++) {
    let sum = 0;
    for (let i = 0; i < inputs; i++) sum += input.data[i] * kernel[o * inputs + i];
    sum += bias[o];
    data[o] = relu ? Math.max(0, sum) : sum;
  }
  return { name, kind: relu ? "dense" : "output", height: 1, width: 1, channels: outputs, data };
}

/** Turns logits into probabilities: exp(logit) divided by the sum of all exp(logit). */
export function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const powers = Float64Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/**
 * Reads the layers' arrays.
 *
 * @param described for each layer its name, kind, inputs and outputs, without its arrays.
 * @param bytes a Uint8Array; for each layer the kernel and the bias as little-endian floating-point
 *   numbers. A convolution's kernel is in the order (output, row, column, input), that of a dense
 *   layer in the order (output, input).
 * @param bits 16 or 32, the size of a number.
 * @returns the layers with `kernel` and `bias` as Float32Arrays.
 */
export function readLayers(described, bytes, bits) {
  const numbers = bits === 16 ? fromFloat16(bytes) : fromFloat32(bytes);
  let start = 0;
  return described.map((layer) => {
    const { kind, inputs, outputs } = layer;
    const count = outputs * inputs * (kind === "convolution" ? 9 : 1);
    // `convolve` reads four outputs at a time, so zeros stand in for those that are missing.
    const kernel = new Float32Array(count + 3 * (count / outputs));
    kernel.set(numbers.subarray(start, start + count));
    const bias = numbers.slice(start + count, start + count + outputs);
    start += count + outputs;
    return { ...layer, kernel, bias };
  });
}

function fromFloat32(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/** Reads numbers of 16 bits: a sign, five bits of exponent, ten of mantissa (IEEE 754). */
function fromFloat16(bytes) {
  const values = Float32Array.from({ length: 2 ** 16 }, (_, half) => {
    const sign = half >> 15 ? -1 : 1, exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent === 31) return mantissa ? NaN : sign * Infinity;
    // An exponent of 0 marks the numbers next to zero, which have no leading 1.
    return exponent === 0
      ? sign * mantissa * 2 ** -24
      : sign * (1024 + mantissa) * 2 ** (exponent - 25);
  });
  const numbers = new Float32Array(bytes.length >> 1);
  for (let i = 0; i < numbers.length; i++) {
    numbers[i] = values[bytes[2 * i] | (bytes[2 * i + 1] << 8)];
  }
  return numbers;
}
