"""The tests that `-m "not slow"` leaves out."""

# Folders and files whose tests train, start processes or measure; a file of quick tests marks single ones.
SLOW = (
    "basicsr_host/test_models.py",
    "basicsr_host/test_train_test_entry.py",
    "commands/test_bench.py",
    "commands/test_compare.py",
    "commands/test_demo.py",
    "data/building/test_lmdb_writer.py",
    "data/test_reproducible.py",
    "data/test_workers.py",
    "lab/measure",
    "report/test_watched_training.py",
    "studies",
    "test_fuzz.py",
    "test_processes.py",
    "training/test_experiment_lock.py",
    "training/test_heartbeat.py",
    "training/test_meeting.py",
    "training/test_resume.py",
    "training/test_shipped_options.py",
    "training/test_training_speed.py",
    "weights/test_shipped.py",
)
