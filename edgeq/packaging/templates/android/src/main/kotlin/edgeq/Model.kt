// Opens an edgeq package and refuses it when a byte or a result is wrong. Plain Kotlin: the runtime and the place of the
// files come from outside, AndroidModel.kt brings Android's.
package edgeq

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.security.MessageDigest
import kotlin.math.abs
import kotlin.math.exp

private const val RUNS = 5 // of a golden run, to tell which variant is fastest
private const val CLEARLY = 0.95 // a later variant must beat the preferred one by more than noise

class Refused(message: String) : Exception(message)

interface Session {
    fun run(inputs: Map<String, Tensor>): Map<String, Tensor>
}

interface Runtime {
    val version: String

    /** Throws where [provider] isn't there. */
    fun open(model: File, provider: String, config: Map<String, String>): Session
}

/**
 * A checked model in the folder [place]. The first start checks every digest and the golden runs of each variant that
 * runs here, takes the fastest and remembers it in [state]; later starts compare sizes and times of the files.
 */
class Model(private val place: File, private val runtime: Runtime, private val state: File) {
    private val session: Session
    val variant: String
    val passedOver: List<String>

    init {
        val choice = remembered() ?: chosen().also(::remember)
        session = choice.session
        variant = choice.variant
        passedOver = choice.passedOver
    }

    fun run(inputs: Map<String, Tensor>) = session.run(inputs)

    /** Best first; of a batch the first row. */
    fun answer(picture: Picture): List<Answer> {
        val before = Contents.preprocessing ?: throw Refused("the package holds no preprocessing for pictures: use run()")
        val after = Contents.postprocessing ?: throw Refused("the package holds no postprocessing: use run()")
        val found = session.run(mapOf(Contents.inputs[0] to preprocess(picture, before)))
        return postprocess(found.getValue(after.output), after, Contents.labels)
    }

    private class Choice(val session: Session, val variant: String, val passedOver: List<String>, val took: Double)

    private fun chosen(): Choice {
        checkFiles()
        checkCanary()
        val golden = File(place, Contents.GOLDEN).readBytes()
        val passed = mutableListOf<String>()
        var best: Choice? = null
        for (one in Contents.variants) {
            try {
                checkMachine(one)
                val opened = runtime.open(File(place, one.model), one.provider, one.session)
                val took = repeatGolden(opened, one, golden, Contents.variants.size > 1)
                val before = best
                if (before != null && took >= CLEARLY * before.took) continue
                if (before != null) passed += "'${before.variant}' isn't used: ${before.took} ms a run, '${one.name}' $took"
                best = Choice(opened, one.name, passed, took)
            } catch (fault: Exception) { // the runtime's own among them; another variant may do
                passed += "'${one.name}' isn't used: ${fault.message}"
            }
        }
        return best ?: throw Refused("no variant runs here: ${passed.joinToString("; ")}")
    }

    private fun checkFiles() {
        for (facts in Contents.files) {
            val file = File(place, facts.name)
            if (!file.exists() && !facts.needed) continue // what is for people may be left out
            if (!file.exists()) throw Refused("${facts.name} is missing")
            if (sha256(file.readBytes()) != facts.sha256) throw Refused("${facts.name} is altered: its sha256 isn't the app's")
        }
    }

    private fun checkCanary() {
        val how = Contents.preprocessing ?: return
        val canary = Contents.canary
        val made = numbers(preprocess(canaryPicture(canary.height, canary.width), how))
        canary.at.forEachIndexed { row, index ->
            if (!(abs(made[index] - canary.values[row]) <= canary.tolerance))
                throw Refused("preprocessing makes ${made[index]} of the canary picture, expected ${canary.values[row]}")
        }
    }

    private fun checkMachine(variant: Variant) {
        val info = File("/proc/cpuinfo") // elsewhere the golden runs alone must tell
        if (!info.canRead()) return
        val flags = info.readText().split(Regex("\\s+")).toSet()
        for (choice in variant.isa)
            if (choice.none { it in flags }) throw Refused("this machine lacks ${choice.joinToString("|")}")
    }

    private fun repeatGolden(session: Session, variant: Variant, golden: ByteArray, timed: Boolean): Double {
        variant.runs.forEachIndexed { index, run ->
            val found = session.run(run.inputs.associate { it.name to tensor(golden, it) })
            for (reference in run.outputs) {
                val tolerance = variant.tolerances.getValue(reference.name)
                if (!near(found.getValue(reference.name), tensor(golden, reference), tolerance))
                    throw Refused("'${reference.name}' differs from golden sample $index by more than $tolerance")
            }
        }
        if (!timed || variant.runs.isEmpty()) return 0.0
        val first = variant.runs[0].inputs.associate { it.name to tensor(golden, it) }
        val laps = List(RUNS) {
            val start = System.nanoTime()
            session.run(first)
            (System.nanoTime() - start) / 1e6
        }
        return laps.sorted()[RUNS / 2]
    }

    private val memory get() = File(state, "${Contents.MANIFEST_SHA256}.kt.txt")

    private fun stamp() = Contents.files.map { File(place, it.name) }.filter(File::exists)
        .joinToString(" ", "${place.absolutePath} ${runtime.version} ") { "${it.length()} ${it.lastModified()}" }

    private fun remembered(): Choice? {
        val lines = if (memory.canRead()) memory.readLines() else return null
        val known = Contents.variants.find { it.name == lines.getOrNull(1) }
        if (known == null || lines[0] != stamp()) return null
        val opened = runtime.open(File(place, known.model), known.provider, known.session)
        return Choice(opened, known.name, lines.drop(2), 0.0)
    }

    private fun remember(choice: Choice) {
        if (!state.isDirectory && !state.mkdirs()) return // nowhere to: all is checked at each start
        val words = choice.passedOver.map { it.replace('\n', ' ') }
        memory.writeText((listOf(stamp(), choice.variant) + words).joinToString("\n"))
    }
}

fun sha256(bytes: ByteArray) =
    MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }

private fun tensor(golden: ByteArray, reference: Reference) = with(reference) {
    if (offset + bytes > golden.size) throw Refused("the golden file is too short")
    Tensor(type, shape, golden.copyOfRange(offset, offset + bytes))
}

private fun near(got: Tensor, want: Tensor, tolerance: Double): Boolean {
    if (got.shape != want.shape || got.type != want.type) return false
    val (one, other) = numbers(got) to numbers(want)
    return one.indices.all { abs(one[it] - other[it]) <= tolerance || one[it].compareTo(other[it]) == 0 }
}

private val SIZES = mapOf(
    "float32" to 4, "float64" to 8, "int8" to 1, "uint8" to 1, "bool" to 1, "int16" to 2, "uint16" to 2, "int32" to 4,
    "uint32" to 4, "int64" to 8
)

fun numbers(tensor: Tensor): DoubleArray {
    val size = SIZES[tensor.type] ?: throw Refused("tensors of type ${tensor.type} can't be compared")
    val data = ByteBuffer.wrap(tensor.bytes).order(ByteOrder.LITTLE_ENDIAN)
    return DoubleArray(tensor.bytes.size / size) {
        when (tensor.type) {
            "float32" -> data.getFloat(4 * it).toDouble()
            "float64" -> data.getDouble(8 * it)
            "int8" -> data.get(it).toDouble()
            "uint8", "bool" -> (data.get(it).toInt() and 255).toDouble()
            "int16" -> data.getShort(2 * it).toDouble()
            "uint16" -> (data.getShort(2 * it).toInt() and 65535).toDouble()
            "int32" -> data.getInt(4 * it).toDouble()
            "uint32" -> (data.getInt(4 * it).toLong() and 4294967295L).toDouble()
            else -> data.getLong(8 * it).toDouble()
        }
    }
}

fun postprocess(scores: Tensor, how: Postprocessing, labels: List<String>): List<Answer> {
    var row = numbers(scores).take(scores.shape.last().toInt())
    if (how.activation == "softmax") {
        val top = row.fold(Double.NEGATIVE_INFINITY) { a, b -> if (a > b) a else b }
        val powers = row.map { exp(it - top) }
        val sum = powers.fold(0.0) { a, b -> a + b }
        row = powers.map { it / sum }
    } else if (how.activation == "sigmoid") row = row.map { 1 / (1 + exp(-it)) }
    val best = row.indices.sortedByDescending { row[it] } // stable: of equal scores the first class first
    return best.take(if (how.top > 0) how.top else best.size).filter { row[it] >= how.threshold }
        .map { Answer(labels.getOrNull(it) ?: "$it", it, row[it]) }
}
