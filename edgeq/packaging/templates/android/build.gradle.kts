// A model by edgeq as an Android library: put this folder beside your app, `include(":@NAME@")`, depend on it.
plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "edgeq.@MODULE@"
    compileSdk = 35
    defaultConfig { minSdk = 24 }
    androidResources { noCompress += listOf("onnx", "bin") }
}

dependencies {
    // Or a build of your own, made smaller with required_operators.config.
    api("com.microsoft.onnxruntime:onnxruntime-android:@ORT_ANDROID@")
}
