// The package's assets, ONNX Runtime and bitmaps of Android for Model.kt.
package edgeq

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import android.content.Context
import android.graphics.Bitmap
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** The model of this module; call it off the main thread, since the first start checks everything. */
fun openModel(context: Context): Model {
    val place = File(context.noBackupFilesDir, "edgeq/${Contents.MANIFEST_SHA256}")
    for (facts in Contents.files.filter { it.needed && !File(place, it.name).exists() }) {
        val partial = File(place, "${facts.name}.partial")
        partial.parentFile!!.mkdirs()
        context.assets.open("${Contents.ASSETS}/${facts.name}").use { from -> partial.outputStream().use { from.copyTo(it) } }
        check(partial.renameTo(File(place, facts.name))) { "can't write ${facts.name}" }
    }
    return Model(place, OnnxRuntime, File(context.noBackupFilesDir, "edgeq-loaded"))
}

fun pictureOf(bitmap: Bitmap): Picture {
    val colours = IntArray(bitmap.width * bitmap.height)
    bitmap.getPixels(colours, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
    val pixels = ByteArray(colours.size * 3) { (colours[it / 3] shr (16 - 8 * (it % 3))).toByte() }
    return Picture(bitmap.height, bitmap.width, pixels)
}

object OnnxRuntime : Runtime {
    private val environment = OrtEnvironment.getEnvironment()
    override val version: String get() = environment.version

    override fun open(model: File, provider: String, config: Map<String, String>): Session {
        val options = OrtSession.SessionOptions()
        when (provider) {
            "CPUExecutionProvider" -> Unit
            "NnapiExecutionProvider" -> options.addNnapi()
            "XnnpackExecutionProvider" -> options.addXnnpack(emptyMap())
            else -> throw Refused("this runtime has no $provider")
        }
        config.forEach { (key, value) -> options.addConfigEntry(key, value) }
        return Opened(environment, environment.createSession(model.path, options))
    }
}

private val TYPES = mapOf(
    "float32" to OnnxJavaType.FLOAT, "float64" to OnnxJavaType.DOUBLE, "int8" to OnnxJavaType.INT8,
    "uint8" to OnnxJavaType.UINT8, "bool" to OnnxJavaType.BOOL, "int16" to OnnxJavaType.INT16,
    "int32" to OnnxJavaType.INT32, "int64" to OnnxJavaType.INT64
)

private class Opened(private val environment: OrtEnvironment, private val session: OrtSession) : Session {
    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val given = inputs.mapValues { (_, tensor) ->
            val type = TYPES[tensor.type] ?: throw Refused("tensors of type ${tensor.type} can't be passed")
            val data = ByteBuffer.allocateDirect(tensor.bytes.size).order(ByteOrder.nativeOrder()).put(tensor.bytes)
            data.rewind()
            OnnxTensor.createTensor(environment, data, tensor.shape.toLongArray(), type)
        }
        try {
            session.run(given).use { results ->
                return results.associate { (name, value) -> name to copied(value as OnnxTensor) }
            }
        } finally {
            given.values.forEach(OnnxTensor::close)
        }
    }

    private fun copied(value: OnnxTensor): Tensor {
        val info = value.info as TensorInfo
        val type = TYPES.entries.find { it.value == info.type }?.key ?: throw Refused("no outputs of type ${info.type}")
        val data = value.byteBuffer
        return Tensor(type, info.shape.toList(), ByteArray(data.remaining()).also { data.get(it) })
    }
}
