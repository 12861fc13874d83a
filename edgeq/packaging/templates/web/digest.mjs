// The one digest that all others hang on: the page trusts this file, and nothing it fetches later.
export const MANIFEST_SHA256 = "@DIGEST@";
