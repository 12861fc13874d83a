// Pictures as model inputs, to the bit what edgeq's own loader makes: weights in whole numbers of 2**-22, each pass
// rounded to the nearest level, the width brought to size first. Plain Kotlin: it runs on any JVM.
package edgeq

import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.PI
import kotlin.math.abs
import kotlin.math.cos
import kotlin.math.max
import kotlin.math.min
import kotlin.math.round
import kotlin.math.sin
import kotlin.math.truncate
import kotlin.math.withSign

private const val PRECISION = 22

private class Image(val height: Int, val width: Int, val channels: Int, val pixels: ByteArray)

private class Taps(val first: Int, val weights: IntArray)

private fun sinc(x: Double) = if (x == 0.0) 1.0 else sin(PI * x) / (PI * x)

private fun support(name: String) = when (name) {
    "box" -> 0.5
    "bicubic" -> 2.0
    "lanczos" -> 3.0
    else -> 1.0
}

private fun weight(name: String, at: Double): Double {
    val x = abs(at)
    return when (name) {
        "box" -> if (at > -0.5 && at <= 0.5) 1.0 else 0.0
        "bilinear" -> max(1 - x, 0.0)
        "hamming" -> if (x < 1) sinc(at) * (0.54 + 0.46 * cos(PI * at)) else 0.0
        "lanczos" -> if (x < 3) sinc(at) * sinc(at / 3) else 0.0
        else -> if (x < 1) (1.5 * x - 2.5) * x * x + 1 else if (x < 2) ((2.5 - 0.5 * x) * x - 4) * x + 2 else 0.0
    }
}

private fun taps(index: Int, found: Int, size: Int, name: String): Taps {
    val ratio = found.toDouble() / size
    if (name == "nearest") return Taps(min(((index + 0.5) * ratio).toInt(), found - 1), intArrayOf(1 shl PRECISION))
    val stretch = max(ratio, 1.0)
    val centre = (index + 0.5) * ratio
    val reach = support(name) * stretch
    val first = max((centre - reach + 0.5).toInt(), 0)
    val last = min((centre + reach + 0.5).toInt(), found)
    val parts = (first until last).map { weight(name, (it - centre + 0.5) / stretch) }
    val sum = parts.fold(0.0) { a, b -> a + b }
    return Taps(first, IntArray(parts.size) {
        val whole = parts[it] / sum * (1 shl PRECISION)
        truncate(whole + 0.5.withSign(whole)).toInt()
    })
}

private fun resampled(image: Image, size: Int, wide: Boolean, name: String): Image {
    val found = if (wide) image.width else image.height
    if (found == size) return image
    val height = if (wide) image.height else size
    val width = if (wide) size else image.width
    val step = if (wide) image.channels else image.width * image.channels
    val all = List(size) { taps(it, found, size, name) }
    val pixels = ByteArray(height * width * image.channels)
    var out = 0
    for (y in 0 until height) for (x in 0 until width) {
        val line = all[if (wide) x else y]
        val begin = (if (wide) y * image.width else x) * image.channels + line.first * step
        for (c in 0 until image.channels) {
            var sum = 1 shl (PRECISION - 1)
            for (tap in line.weights.indices) sum += line.weights[tap] * (image.pixels[begin + tap * step + c].toInt() and 255)
            pixels[out++] = min(max(sum shr PRECISION, 0), 255).toByte()
        }
    }
    return Image(height, width, image.channels, pixels)
}

private fun cropped(image: Image, height: Int, width: Int): Image {
    val top = round((image.height - height) / 2.0).toInt() // halves to even
    val left = round((image.width - width) / 2.0).toInt()
    val pixels = ByteArray(height * width * image.channels)
    for (y in max(-top, 0) until min(height, image.height - top))
        for (x in max(-left, 0) until min(width, image.width - left))
            for (c in 0 until image.channels)
                pixels[(y * width + x) * image.channels + c] =
                    image.pixels[((y + top) * image.width + x + left) * image.channels + c]
    return Image(height, width, image.channels, pixels)
}

private fun grey(picture: Picture): Image {
    fun level(i: Int) = picture.pixels[i].toInt() and 255
    val pixels = ByteArray(picture.height * picture.width) {
        ((level(3 * it) * 19595 + level(3 * it + 1) * 38470 + level(3 * it + 2) * 7471 + 0x8000) shr 16).toByte()
    }
    return Image(picture.height, picture.width, 1, pixels)
}

fun preprocess(picture: Picture, how: Preprocessing): Tensor {
    var image = if (how.channels == "L") grey(picture) else Image(picture.height, picture.width, 3, picture.pixels)
    if (how.resize.isNotEmpty()) {
        var (height, width) = listOf(how.resize.first(), how.resize.last())
        if (how.resize.size == 1) { // the shorter side; the longer one is truncated
            val shorter = min(image.height, image.width)
            height = (how.resize[0].toDouble() * image.height / shorter).toInt()
            width = (how.resize[0].toDouble() * image.width / shorter).toInt()
        }
        image = resampled(resampled(image, width, true, how.interpolation), height, false, how.interpolation)
    }
    if (how.crop.isNotEmpty()) image = cropped(image, how.crop[0], how.crop[1])
    return scaled(image, how)
}

private fun scaled(image: Image, how: Preprocessing): Tensor {
    val planes = how.layout == "NCHW"
    val count = image.height * image.width
    val whole = how.type == "uint8" // the model does the arithmetic
    val bytes = ByteBuffer.allocate(count * image.channels * if (whole) 1 else 4).order(ByteOrder.LITTLE_ENDIAN)
    for (i in 0 until count) for (c in 0 until image.channels) {
        val pixel = image.pixels[i * image.channels + if (how.channels == "BGR") image.channels - 1 - c else c].toInt() and 255
        val value = (pixel * how.scale - how.mean[if (how.mean.size > 1) c else 0]) / how.std[if (how.std.size > 1) c else 0]
        val at = if (planes) c * count + i else i * image.channels + c
        if (whole) bytes.put(at, value.toInt().toByte()) else bytes.putFloat(4 * at, value)
    }
    val (height, width, channels) = listOf(image.height, image.width, image.channels).map(Int::toLong)
    val shape = if (planes) listOf(1L, channels, height, width) else listOf(1L, height, width, channels)
    return Tensor(how.type, shape, bytes.array())
}

/** The picture whose values the manifest knows. */
fun canaryPicture(height: Int, width: Int) =
    Picture(height, width, ByteArray(height * width * 3) { (it * 2654435761L.toInt() ushr 24).toByte() })
