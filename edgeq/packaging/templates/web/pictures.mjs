// Pictures as model inputs, to the bit what edgeq's own loader makes: weights in whole numbers of 2**-22, each pass
// rounded to the nearest level, the width brought to size first.
const PRECISION = 22;
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = { // name: [support, weight at a distance]
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(1 - Math.abs(x), 0)],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, (x) => bicubic(Math.abs(x))],
  lanczos: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const bicubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0);

/** ImageData (or { data: RGBA bytes, width, height }) -> { data: Float32Array, dims }. */
export function preprocess(picture, how) {
  let image = how.channels === "L" ? grey(picture) : colours(picture);
  if (how.resize !== null) {
    const short = Math.min(image.height, image.width);
    const [height, width] = Array.isArray(how.resize)
      ? how.resize
      : [image.height, image.width].map((side) => Math.trunc((how.resize * side) / short));
    image = resampled(resampled(image, width, true, how.interpolation), height, false, how.interpolation);
  }
  if (how.crop !== null) image = cropped(image, ...how.crop);
  return scaled(image, how);
}

function colours({ data, width, height }) {
  const pixels = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) for (let c = 0; c < 3; c++) pixels[j++] = data[i + c];
  return { pixels, width, height, channels: 3 };
}

function grey({ data, width, height }) {
  const pixels = new Uint8Array(width * height);
  for (let i = 0, j = 0; i < data.length; i += 4)
    pixels[j++] = (data[i] * 19595 + data[i + 1] * 38470 + data[i + 2] * 7471 + 0x8000) >> 16;
  return { pixels, width, height, channels: 1 };
}

function resampled(image, size, wide, name) {
  const found = wide ? image.width : image.height;
  if (found === size) return image;
  const { channels } = image;
  const [width, height] = wide ? [size, image.height] : [image.width, size];
  const pixels = new Uint8Array(width * height * channels);
  const step = wide ? channels : image.width * channels;
  const at = (x, y) => (wide ? y * image.width : x) * channels; // where the line through (x, y) begins
  const taps = Array.from({ length: size }, (_, index) => weights(index, found, size, name));
  for (let y = 0, out = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const { first, parts } = taps[wide ? x : y];
      for (let c = 0; c < channels; c++) {
        let sum = 1 << (PRECISION - 1);
        let from = at(x, y) + first * step + c;
        for (const part of parts) {
          sum += part * image.pixels[from];
          from += step;
        }
        pixels[out++] = Math.min(Math.max(sum >> PRECISION, 0), 255);
      }
    }
  return { pixels, width, height, channels };
}

function weights(index, found, size, name) {
  const ratio = found / size;
  if (name === "nearest") return { first: Math.min(Math.trunc((index + 0.5) * ratio), found - 1), parts: [1 << PRECISION] };
  const [reach, weight] = FILTERS[name];
  const stretch = Math.max(ratio, 1);
  const centre = (index + 0.5) * ratio;
  const first = Math.max(Math.trunc(centre - reach * stretch + 0.5), 0);
  const last = Math.min(Math.trunc(centre + reach * stretch + 0.5), found);
  const parts = Array.from({ length: last - first }, (_, tap) => weight((first + tap - centre + 0.5) / stretch));
  const sum = parts.reduce((a, b) => a + b, 0);
  return { first, parts: parts.map((part) => Math.trunc((part / sum) * (1 << PRECISION) + Math.sign(part) * 0.5)) };
}

const halfToEven = (twice) => (twice % 2 === 0 ? twice / 2 : 2 * Math.round(twice / 4)); // twice the value, a whole number

function cropped(image, height, width) {
  const { channels } = image;
  const [top, left] = [halfToEven(image.height - height), halfToEven(image.width - width)];
  const pixels = new Uint8Array(height * width * channels); // zeros outside the picture
  for (let y = Math.max(-top, 0); y < Math.min(height, image.height - top); y++)
    for (let x = Math.max(-left, 0); x < Math.min(width, image.width - left); x++)
      for (let c = 0; c < channels; c++)
        pixels[(y * width + x) * channels + c] = image.pixels[((y + top) * image.width + x + left) * channels + c];
  return { pixels, width, height, channels };
}

function scaled({ pixels, width, height, channels }, how) {
  const data = new Float32Array(pixels.length);
  const f = Math.fround;
  const [mean, std] = [how.mean, how.std].map((row) => Array.from({ length: channels }, (_, c) => f(row[row.length > 1 ? c : 0])));
  const planes = how.layout === "NCHW";
  for (let i = 0; i < width * height; i++)
    for (let c = 0; c < channels; c++) {
      const pixel = pixels[i * channels + (how.channels === "BGR" ? channels - 1 - c : c)];
      data[planes ? c * width * height + i : i * channels + c] = f(f(f(pixel * f(how.scale)) - mean[c]) / std[c]);
    }
  const dims = planes ? [1, channels, height, width] : [1, height, width, channels];
  return how.dtype === "uint8" ? { data: Uint8Array.from(data), dims, dtype: "uint8" } : { data, dims, dtype: "float32" };
}

/** The picture whose values the manifest knows, RGBA. */
export function canaryPicture(height, width) {
  const data = new Uint8ClampedArray(height * width * 4).fill(255);
  for (let i = 0; i < height * width * 3; i++) data[Math.trunc(i / 3) * 4 + (i % 3)] = Math.imul(i, 2654435761) >>> 24;
  return { data, width, height };
}
