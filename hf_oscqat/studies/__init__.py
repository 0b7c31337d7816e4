"""The paper's studies, each a command: `oscqat study NAME` measures, prints a table and writes it with a picture."""

from hf_oscqat.studies import batchnorm, cifar10, distances, sampling, toy
from hf_oscqat.studies.base import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        toy.STUDY,
        batchnorm.DIVERGENCE,
        batchnorm.REESTIMATION,
        distances.STUDY,
        sampling.STUDY,
        cifar10.STUDY,
    )
}
