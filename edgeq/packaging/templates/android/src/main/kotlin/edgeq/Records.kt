// What Contents.kt is made of: the package's manifest as tables, so that the app holds every digest itself.
package edgeq

class FileFacts(val name: String, val sha256: String, val needed: Boolean)

/** Where an array lies in the golden file. */
class Reference(val name: String, val type: String, val shape: List<Long>, val offset: Int, val bytes: Int)

class GoldenRun(val inputs: List<Reference>, val outputs: List<Reference>)

class Variant(
    val name: String,
    val model: String,
    val provider: String,
    val isa: List<List<String>>, // of each row one is needed
    val session: Map<String, String>,
    val runs: List<GoldenRun>,
    val tolerances: Map<String, Double>
)

/** [resize]: none, a shorter side, or height and width. */
class Preprocessing(
    val resize: List<Int>,
    val crop: List<Int>,
    val interpolation: String,
    val scale: Float,
    val mean: List<Float>,
    val std: List<Float>,
    val layout: String,
    val channels: String,
    val type: String
)

/** What a known picture becomes. */
class Canary(val height: Int, val width: Int, val at: List<Int>, val values: List<Double>, val tolerance: Double)

class Postprocessing(val output: String, val activation: String, val top: Int, val threshold: Double)

class Tensor(val type: String, val shape: List<Long>, val bytes: ByteArray)

class Answer(val label: String, val index: Int, val score: Double)

/** RGB, a byte a channel, rows from the top. */
class Picture(val height: Int, val width: Int, val pixels: ByteArray)
