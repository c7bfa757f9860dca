"""placeholder"""


def predictions_of(study, configs):
    return {}, []
