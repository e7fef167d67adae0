"""Makes the malformed files of this folder and ``index.json``, which says how each must be refused.

Standard library only, and typed by hand from the spec: it must not share mistakes with the reader it tests.

    python make_invalid.py            write the files
    python make_invalid.py --check    fail if a file differs from what would be written
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
T_F32, T_Q8_0, T_P2, T_P2_5, T_P2_75, T_T1_5, T_T1, T_T2, T_T2_5, T_T3 = 0, 8, 4, 5, 31, 32, 33, 36, 37, 38


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return u32(kind) + u64(count) + values


def tensor(name: str | bytes, dims: list[int], kind: int, offset: int, n_dims: int | None = None) -> bytes:
    """One entry of the tensor list; ``dims`` in file order, the row length first."""
    shape = b"".join(u64(n) for n in dims)
    return string(name) + u32(len(dims) if n_dims is None else n_dims) + shape + u32(kind) + u64(offset)


ARCH = key("general.architecture", STRING, string("llama"))
SPEC = key("ccq.spec_version", STRING, string("0.1"))


def gguf(
    keys: list[bytes],
    tensors: list[bytes],
    data: int | bytes = 0,
    *,
    version: bytes = u32(3),
    magic: bytes = b"GGUF",
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; counts default to the true ones, ``data`` is the data section or its size."""
    head = magic + version
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    body = bytes(data) if isinstance(data, int) else data
    return head + bytes(-len(head) % alignment if tensors else 0) + body


def one(dims: list[int], kind: int, data: int, **more: int) -> bytes:
    """A file with a single tensor ``a``."""
    return gguf([ARCH, SPEC], [tensor("a", dims, kind, 0, **more)], data)


# A 2 x 64 CCQ_T2 tensor (34 bytes, padded to 64) and a vector of 8 float32 (32 bytes).
GOOD = gguf([ARCH, SPEC], [tensor("a", [64, 2], T_T2, 0), tensor("b", [8], T_F32, 64)], 96)
GOOD_DATA = len(GOOD) - 96
KEYS_AT = 24
TENSORS_AT = KEYS_AT + len(ARCH) + len(SPEC)

CASES: dict[str, tuple[bytes, str, str]] = {
    # --- cut short
    "empty": (b"", "TruncatedError", "inside the magic"),
    "truncated_magic": (GOOD[:3], "TruncatedError", "inside the magic"),
    "truncated_version": (GOOD[:6], "TruncatedError", "inside the GGUF version"),
    "truncated_counts": (GOOD[:20], "TruncatedError", "inside the key count"),
    "truncated_key": (GOOD[: KEYS_AT + 12], "TruncatedError", "inside key 0"),
    "truncated_key_type": (GOOD[: KEYS_AT + 30], "TruncatedError", "inside the type of the value"),
    "truncated_value": (
        GOOD[: KEYS_AT + len(ARCH) - 2],
        "TruncatedError",
        "inside the value of 'general.architecture'",
    ),
    "truncated_tensor_name": (GOOD[: TENSORS_AT + 8], "TruncatedError", "inside the name of tensor 0"),
    "truncated_tensor_shape": (GOOD[: TENSORS_AT + 20], "TruncatedError", "inside the shape of tensor 'a'"),
    "truncated_tensor_list": (GOOD[: TENSORS_AT + 50], "TruncatedError", "inside the dimension count of tensor 'b'"),
    "truncated_data": (GOOD[:-1], "TruncatedError", "tensor 'b': its data ends at byte"),
    "truncated_data_all": (GOOD[:GOOD_DATA], "TruncatedError", "tensor 'a': its data ends at byte"),
    # --- not this container
    "magic_other": (gguf([ARCH], [], magic=b"GGML"), "NotGgufError", "starts with b'GGML'"),
    "magic_swapped": (gguf([ARCH], [], magic=b"FUGG"), "NotGgufError", "starts with b'FUGG'"),
    "version_0": (gguf([ARCH], [], version=u32(0)), "GgufVersionError", "GGUF version 0"),
    "version_1": (gguf([ARCH], [], version=u32(1)), "GgufVersionError", "GGUF version 1"),
    "version_4": (gguf([ARCH], [], version=u32(4)), "GgufVersionError", "GGUF version 4"),
    "big_endian": (gguf([ARCH], [], version=struct.pack(">I", 3)), "GgufVersionError", "big-endian"),
    # --- absurd counts and lengths
    "tensor_count_absurd": (gguf([ARCH], [], n_tensors=2**63), "HeaderError", "announces 9223372036854775808 tensors"),
    "tensor_count_too_large": (gguf([ARCH], [], n_tensors=5), "TruncatedError", "the name of tensor 0"),
    "key_count_absurd": (gguf([ARCH], [], n_keys=2**40), "HeaderError", "announces 1099511627776 keys"),
    "key_count_too_large": (gguf([ARCH], [], n_keys=2), "TruncatedError", "key 1"),
    "key_length_absurd": (gguf([u64(2**62) + b"abc"], []), "HeaderError", "key 0 is 4611686018427387904 bytes long"),
    "string_length_absurd": (
        gguf([key("a", STRING, u64(2**64 - 1) + b"abc")], []),
        "HeaderError",
        "the value of 'a' is 18446744073709551615 bytes long",
    ),
    "string_length_too_large": (
        gguf([key("a", STRING, u64(2**20) + b"abc")], []),
        "TruncatedError",
        "the value of 'a'",
    ),
    "array_length_absurd": (
        gguf([key("a", ARRAY, array(U8, 2**61, b"abc"))], []),
        "HeaderError",
        "has 2305843009213693952 elements",
    ),
    "array_length_too_large": (gguf([key("a", ARRAY, array(F32, 2**22, b"abc"))], []), "TruncatedError", "'a'"),
    "string_array_too_large": (gguf([key("a", ARRAY, array(STRING, 2**22, b"abc"))], []), "TruncatedError", "'a'"),
    # --- keys and values
    "key_empty": (gguf([key("", U32, u32(1))], []), "HeaderError", "key 0 is empty"),
    "key_duplicate": (gguf([ARCH, SPEC, ARCH], []), "HeaderError", "'general.architecture' appears twice"),
    "key_bad_utf8": (gguf([key(b"a\xff\xfe", U32, u32(1))], []), "HeaderError", "key 0 is no valid UTF-8"),
    "value_bad_utf8": (gguf([key("a", STRING, string(b"\xc3("))], []), "HeaderError", "'a' is no valid UTF-8"),
    "value_surrogate": (gguf([key("a", STRING, string(b"\xed\xa0\x80"))], []), "HeaderError", "no valid UTF-8"),
    "array_bad_utf8": (
        gguf([key("a", ARRAY, array(STRING, 2, string("x") + string(b"\x80")))], []),
        "HeaderError",
        "'a' is no valid UTF-8",
    ),
    "value_type_unknown": (gguf([key("a", 13, u32(1))], []), "HeaderError", "unknown value type 13"),
    "element_type_unknown": (gguf([key("a", ARRAY, array(99, 1, u32(1)))], []), "HeaderError", "unknown value type 99"),
    "bool_2": (gguf([key("a", BOOL, b"\2")], []), "HeaderError", "neither 0 nor 1"),
    "array_nested": (
        gguf([key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"x")))], []),
        "HeaderError",
        "array of arrays",
    ),
    "array_nested_deep": (
        gguf([key("a", ARRAY, b"".join(array(ARRAY, 1, b"") for _ in range(200)) + array(U8, 1, b"x"))], []),
        "HeaderError",
        "array of arrays",
    ),
    "array_nested_bomb": (
        gguf([key("a", ARRAY, array(ARRAY, 2**60, b"") + array(ARRAY, 2**60, b""))], []),
        "HeaderError",
        "array of arrays",
    ),
    # --- alignment
    "alignment_0": (gguf([key("general.alignment", U32, u32(0))], []), "AlignmentError", "is 0, which is no power"),
    "alignment_48": (gguf([key("general.alignment", U32, u32(48))], []), "AlignmentError", "is 48, which is no power"),
    "alignment_u64": (
        gguf([key("general.alignment", U64, u64(32))], []),
        "HeaderError",
        "general.alignment is no uint32",
    ),
    "alignment_string": (
        gguf([key("general.alignment", STRING, string("32"))], []),
        "HeaderError",
        "general.alignment is no uint32",
    ),
    "alignment_beyond_file": (
        gguf([key("general.alignment", U32, u32(2**31))], [tensor("a", [8], T_F32, 0)], 32),
        "TruncatedError",
        "its data ends at byte 2147483680",
    ),
    # --- the ccq.* keys
    "spec_version_newer_minor": (
        gguf([ARCH, key("ccq.spec_version", STRING, string("0.2"))], []),
        "SpecVersionError",
        "needs CCQ specification 0.2",
    ),
    "spec_version_other_major": (
        gguf([ARCH, key("ccq.spec_version", STRING, string("1.0"))], []),
        "SpecVersionError",
        "needs CCQ specification 1.0",
    ),
    "spec_version_newer_before_types": (  # a type of the future must not hide the version that explains it
        gguf([ARCH, key("ccq.spec_version", STRING, string("1.4"))], [tensor("a", [64], 77, 0)], 32),
        "SpecVersionError",
        "needs CCQ specification 1.4",
    ),
    "spec_version_u32": (gguf([ARCH, key("ccq.spec_version", U32, u32(1))], []), "SpecVersionError", "not a string"),
    "spec_version_float": (
        gguf([ARCH, key("ccq.spec_version", F32, struct.pack("<f", 0.5))], []),
        "SpecVersionError",
        "not a string",
    ),
    "spec_version_garbage": (
        gguf([ARCH, key("ccq.spec_version", STRING, string("0.1-rc1"))], []),
        "SpecVersionError",
        "not a string 'MAJOR.MINOR'",
    ),
    "spec_version_array": (
        gguf([ARCH, key("ccq.spec_version", ARRAY, array(STRING, 1, string("0.1")))], []),
        "SpecVersionError",
        "not a string",
    ),
    "feature_unknown": (
        gguf([ARCH, SPEC, key("ccq.features", ARRAY, array(STRING, 1, string("hadamard")))], []),
        "FeatureError",
        "unknown feature 'hadamard'",
    ),
    "feature_unknown_no_version": (
        gguf([ARCH, key("ccq.features", ARRAY, array(STRING, 1, string("")))], []),
        "FeatureError",
        "unknown feature ''",
    ),
    "features_string": (
        gguf([ARCH, SPEC, key("ccq.features", STRING, string("hadamard"))], []),
        "FeatureError",
        "no array of strings",
    ),
    "features_numbers": (
        gguf([ARCH, SPEC, key("ccq.features", ARRAY, array(U32, 0, b""))], []),
        "FeatureError",
        "no array of strings",
    ),
    "encoder_u32": (gguf([ARCH, SPEC, key("ccq.encoder", U32, u32(1))], []), "HeaderError", "ccq.encoder is no string"),
    # --- the tensor list
    "tensor_duplicate": (
        gguf([ARCH], [tensor("a", [8], T_F32, 0), tensor("a", [8], T_F32, 32)], 64),
        "HeaderError",
        "tensor 'a': the name appears twice",
    ),
    "tensor_name_empty": (
        gguf([ARCH], [tensor("", [8], T_F32, 0)], 32),
        "HeaderError",
        "the name of tensor 0 is empty",
    ),
    "tensor_name_null": (gguf([ARCH], [tensor("a\0b", [8], T_F32, 0)], 32), "HeaderError", "null character"),
    "tensor_name_long": (gguf([ARCH], [tensor("n" * 64, [8], T_F32, 0)], 32), "HeaderError", "64 bytes long"),
    "tensor_name_bad_utf8": (gguf([ARCH], [tensor(b"\xfe", [8], T_F32, 0)], 32), "HeaderError", "no valid UTF-8"),
    "dims_none": (one([], T_F32, 32), "ShapeError", "has 0 dimensions"),
    "dims_5": (one([8, 1, 1, 1, 1], T_F32, 32), "ShapeError", "has 5 dimensions"),
    "dims_absurd": (one([8], T_F32, 32, n_dims=2**32 - 1), "ShapeError", "has 4294967295 dimensions"),
    "dims_zero": (one([64, 0], T_T2, 0), "ShapeError", "empty dimension"),
    "dims_overflow": (one([2**32, 2**32, 2**10], T_F32, 32), "ShapeError", "more than 64 bits can count"),
    "dims_overflow_wraps": (one([2**32, 2**32], T_T2, 32), "ShapeError", "more than 64 bits can count"),
    "dims_negative": (one([2**64 - 1], T_F32, 32), "ShapeError", "more than 64 bits can count"),
    "dims_huge": (one([2**40, 2**20], T_T3, 64), "TruncatedError", "its data ends at byte"),
    "row_not_multiple_t2": (
        one([96, 2], T_T2, 64),
        "ShapeError",
        "row length 96 is no multiple of 64, the block of ccq_t2",
    ),
    "row_not_multiple_t1": (
        one([192, 2], T_T1, 64),
        "ShapeError",
        "row length 192 is no multiple of 128, the block of ccq_t1",
    ),
    "row_not_multiple_p2": (
        one([768], T_P2, 448),
        "ShapeError",
        "row length 768 is no multiple of 512, the block of ccq_p2",
    ),
    "row_not_multiple_p2_5": (one([64, 4], T_P2_5, 96), "ShapeError", "row length 64 is no multiple of 256"),
    "row_not_multiple_q8_0": (
        one([40], T_Q8_0, 64),
        "ShapeError",
        "row length 40 is no multiple of 32, the block of q8_0",
    ),
    "type_unknown": (one([64], 1000, 64), "TensorTypeError", "unknown type id 1000"),
    "type_negative": (one([64], 2**32 - 1, 64), "TensorTypeError", "unknown type id 4294967295"),
    # --- where tensors lie
    "offset_misaligned": (
        gguf([ARCH], [tensor("a", [8], T_F32, 0), tensor("b", [8], T_F32, 40)], 96),
        "AlignmentError",
        "tensor 'b': offset 40 is no multiple of the alignment 32",
    ),
    "offset_misaligned_custom": (
        gguf(
            [key("general.alignment", U32, u32(64))],
            [tensor("a", [8], T_F32, 0), tensor("b", [8], T_F32, 32)],
            128,
            alignment=64,
        ),
        "AlignmentError",
        "tensor 'b': offset 32 is no multiple of the alignment 64",
    ),
    "offset_overlap": (
        gguf([ARCH], [tensor("a", [16], T_F32, 0), tensor("b", [16], T_F32, 32)], 128),
        "OverlapError",
        "tensor 'b': offset 32 lies inside the tensor before, which ends at 64",
    ),
    "offset_overlap_ccq": (
        gguf([ARCH, SPEC], [tensor("a", [64, 4], T_T2, 0), tensor("b", [64, 4], T_T2, 64)], 192),
        "OverlapError",
        "tensor 'b': offset 64 lies inside the tensor before, which ends at 96",
    ),
    "offset_same": (
        gguf([ARCH], [tensor("a", [8], T_F32, 0), tensor("b", [8], T_F32, 0)], 64),
        "OverlapError",
        "tensor 'b': offset 0 lies inside",
    ),
    "offset_out_of_bounds": (
        gguf([ARCH], [tensor("a", [8], T_F32, 0), tensor("b", [8], T_F32, 2**20)], 64),
        "TruncatedError",
        "tensor 'b': its data ends at byte",
    ),
    "offset_wraps": (
        gguf([ARCH], [tensor("a", [8], T_F32, 0), tensor("b", [8], T_F32, 2**64 - 32)], 64),
        "TruncatedError",
        "tensor 'b': its data ends at byte",
    ),
    "offset_first_not_0": (gguf([ARCH], [tensor("a", [8], T_F32, 32)], 64), "HeaderError", "leaves a gap: expected 0"),
    "offset_gap": (
        gguf([ARCH], [tensor("a", [8], T_F32, 0), tensor("b", [8], T_F32, 64)], 96),
        "HeaderError",
        "tensor 'b': offset 64 leaves a gap: expected 32",
    ),
    "data_after_last": (
        gguf([ARCH, SPEC], [tensor("a", [64, 2], T_T2, 0), tensor("b", [8], T_F32, 64)], 160),
        "HeaderError",
        "64 bytes follow the last tensor",
    ),
    # --- files in which an id of ours means another type (spec section 4.3): removed ones, and those of BitNet
    "legacy_31": (
        gguf([ARCH], [tensor("a", [256, 2], 31, 0), tensor("b", [8], T_F32, 288)], 320),
        "TensorTypeError",
        "tensor 'a': takes 288 bytes in the file, as Q4_0_4_4 would, and not 180 as ccq_p2_75",
    ),
    "legacy_31_last": (
        gguf([ARCH], [tensor("b", [8], T_F32, 0), tensor("a", [256, 2], 31, 32)], 320),
        "TensorTypeError",
        "tensor 'a': takes 288 bytes in the file, as Q4_0_4_4 would, and not 180 as ccq_p2_75",
    ),
    "legacy_32": (
        gguf([ARCH], [tensor("a", [64, 4], 32, 0), tensor("b", [8], T_F32, 160)], 192),
        "TensorTypeError",
        "in this file type id 32 is Q4_0_4_8",
    ),
    "legacy_33": (
        gguf([ARCH], [tensor("a", [128, 2], 33, 0), tensor("b", [8], T_F32, 160)], 192),
        "TensorTypeError",
        "tensor 'a': takes 160 bytes in the file, as Q4_0_8_8 would, and not 34 as ccq_t1",
    ),
    "legacy_36": (
        gguf([ARCH], [tensor("a", [64, 4], 36, 0), tensor("b", [8], T_F32, 160)], 192),
        "TensorTypeError",
        "tensor 'a': takes 160 bytes in the file, as IQ4_NL_4_4 would, and not 68 as ccq_t2",
    ),
    "legacy_37": (
        gguf([ARCH], [tensor("a", [64, 4], 37, 0), tensor("b", [8], T_F32, 160)], 192),
        "TensorTypeError",
        "in this file type id 37 is IQ4_NL_4_8",
    ),
    "legacy_38": (
        gguf([ARCH], [tensor("a", [64, 4], 38, 0), tensor("b", [8], T_F32, 160)], 192),
        "TensorTypeError",
        "in this file type id 38 is IQ4_NL_8_8",
    ),
    "legacy_4": (
        gguf([ARCH], [tensor("a", [512], 4, 0), tensor("b", [8], T_F32, 320)], 352),
        "TensorTypeError",
        "in this file type id 4 is Q4_2",
    ),
    "legacy_5": (
        gguf([ARCH], [tensor("a", [256], 5, 0), tensor("b", [8], T_F32, 192)], 224),
        "TensorTypeError",
        "in this file type id 5 is Q4_3",
    ),
    "bitnet_i2_s": (
        gguf([ARCH], [tensor("a", [64, 40], 36, 0), tensor("b", [8], T_F32, 672)], 704),
        "TensorTypeError",
        "tensor 'a': takes 672 bytes in the file, as BitNet's I2_S would, and not 680 as ccq_t2: in this file type id "
        "36 is BitNet's I2_S",
    ),
    "bitnet_i2_s_last": (
        gguf([ARCH], [tensor("b", [8], T_F32, 0), tensor("a", [64, 40], 36, 32)], 704),
        "TensorTypeError",
        "in this file type id 36 is BitNet's I2_S",
    ),
    "bitnet_i2_s_small": (
        gguf([ARCH], [tensor("a", [64, 4], 36, 0), tensor("b", [8], T_F32, 128)], 160),
        "TensorTypeError",
        "tensor 'a': takes 128 bytes in the file, but 68 as ccq_t2: type id 36 may mean something else in this file",
    ),
    "bitnet_i8_s": (
        gguf([ARCH], [tensor("a", [64, 4], 37, 0), tensor("b", [8], T_F32, 256)], 288),
        "TensorTypeError",
        "in this file type id 37 is BitNet's I8_S",
    ),
    "bitnet_tl1": (
        gguf([ARCH], [tensor("a", [64, 40], 38, 0), tensor("b", [8], T_F32, 672)], 704),
        "TensorTypeError",
        "in this file type id 38 is BitNet's TL1",
    ),
    "legacy_36_row_32": (one([96, 2], 36, 128), "ShapeError", "row length 96 is no multiple of 64"),
}


def contents() -> dict[str, bytes]:
    """Every generated file of this folder."""
    files = {f"{name}.gguf": data for name, (data, _, _) in CASES.items()}
    index = {f"{name}.gguf": {"error": error, "message": message} for name, (_, error, message) in CASES.items()}
    files["index.json"] = (json.dumps(index, indent=1) + "\n").encode()
    return files


def main() -> int:
    files = contents()
    stale = {path.name for path in HERE.glob("*.gguf")} - set(files)
    if "--check" in sys.argv[1:]:
        wrong = [n for n, data in files.items() if not (HERE / n).is_file() or (HERE / n).read_bytes() != data]
        wrong += sorted(stale)
        for name in wrong:
            print(f"{HERE / name}: out of date; run make_invalid.py")
        return 1 if wrong else 0
    for name in stale:
        (HERE / name).unlink()
    for name, data in files.items():
        (HERE / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
