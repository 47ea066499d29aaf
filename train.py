"""Train a teacher, distil a student from it, measure both, export the student: `python train.py --help`."""

from distill.app import train

if __name__ == "__main__":
    train()
