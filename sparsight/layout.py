"""Where things lie in a run: the names of its artefacts, and of the model directory inside one.

Names only; what an artefact is says `artifacts`, what one holds says the stage that writes it. Used by the pipelines,
and by the service for the export.
"""

TEACHER_SAMPLES = "samples/teacher"
STUDENT_SAMPLES = "samples/student"
VALIDATION_SAMPLES = "samples/validation"
KEPT_SAMPLES = "samples/kept"
TEST_STREAMS = "samples/test_streams"
VALIDATION_STREAMS = "samples/validation_streams"
IMPORTED_PAIRS = "samples/imported_pairs"
TEACHER = "teacher"
SIGNALS = "signals"
SCORED_IMPORT = "pairs/imported"
FEATURES = "features"
EXPORT = "export"
EVALUATION = "evaluation"
STREAM_EVALUATION = "stream_evaluation"
RETRIEVAL_HEADS = "retrieval_heads"
REPORT = "report"

MODEL = "model"
"""The model directory inside an artefact that holds one."""


def features_of(tower_fingerprint: str) -> str:
    """The feature table of a tower."""
    return f"{FEATURES}/{tower_fingerprint[:16]}"


def held_out_samples(name: str) -> str:
    """The samples of a test set."""
    return f"samples/test_{name}"


def asked(sets: str, artifact: str) -> str:
    """The evaluation of some sets of questions, or its report: those of `tests` lie at the top of the run."""
    return artifact if sets == "tests" else f"{sets}/{artifact}"


def student_stage(student: str, stage: str) -> str:
    """What a student was after one of its stages."""
    return f"students/{student}/{stage}"


def pairs_after(stage_uri: str) -> str:
    """The pairs that the model of a student's stage answered for; `stage_uri` is where that stage lies."""
    return f"pairs/{stage_uri.rpartition('/students/')[2]}"
