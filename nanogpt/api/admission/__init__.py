"""Who may use the endpoint: keys, bans, limits, rules against abuse, and a log of it all."""

from nanogpt.admission_config import AdmissionConfig
from nanogpt.api.admission.admission import Admission, AdmissionStats
from nanogpt.api.admission.keys import Principal
from nanogpt.api.admission.limits import Ticket

__all__ = ["Admission", "AdmissionConfig", "AdmissionStats", "Principal", "Ticket"]
