"""Tasks that needles do not predict: association, like requests, graphs, retrieved passages and stories.

Each is a config as in RULER (lct/eval/tasks/ruler.py), with the metric of its samples in their meta.
"""

from lct.eval.tasks import qa_documents
from lct.eval.tasks.associations import Association
from lct.eval.tasks.graph import Parents, Walk
from lct.eval.tasks.nth_request import NthRequest
from lct.eval.tasks.passages import RetrievedPassages
from lct.eval.tasks.story import Count, Order

DEFAULTS = {config.task: config for config in (
    Association('association_1', 1), Association('association_2', 2),
    NthRequest('nth_request_2', 2), NthRequest('nth_request_4', 4), NthRequest('nth_request_8', 8),
    Parents('graph_parents'), Walk('graph_walk_2', 2), Walk('graph_walk_3', 3),
    RetrievedPassages('passages', 'passages'), Order('story_order'), Count('story_count'),
)}
OF_FILES = {f'passages_{name}': RetrievedPassages(f'passages_{name}', name) for name in qa_documents.FILES}
TASKS = DEFAULTS | OF_FILES
