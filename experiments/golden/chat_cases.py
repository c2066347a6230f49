"""Chat templates and messages, shared by make_golden_chat.py and the tests that compare with its results.

The templates are small ones in the style of the Llama family, except for SmolLM2's, which is HuggingFaceTB's
own (Apache-2.0) from the GGUF file of the model.
"""

LLAMA3 = '''{% for message in messages %}
    {% if loop.first %}{{ bos_token }}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}'''

LLAMA31 = '''{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set state = namespace(system="", calls=0) %}
{%- if messages and messages[0].role == "system" %}
    {%- set state.system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none and tools %}
    {{- "Answer with {name, parameters} of one of these functions.\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- state.system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call at a time, got " ~ message.tool_calls | length) }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {%- set state.calls = state.calls + 1 %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {%- generation %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}
        {{- "}<|eom_id|>" }}
        {%- endgeneration %}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is not string %}
            {{- message.content | tojson(sort_keys=true, separators=(",", ":")) }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "skip" %}
        {%- continue %}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
        {{- message.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
{%- if state.calls %}{{ "<!-- " ~ state.calls ~ " -->" }}{% endif %}
'''

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FEATURES = '''
  {%- for i in range(5) -%}
    {% if i == 3 %}{% break %}{% endif %}
    {{ i }}
  {% endfor %}
  {% set d = dict(a=1, b="x") %}
  {% for key, value in d.items() %}
    {{ key }}={{ value }}
  {% endfor %}
  {% macro shout(text) %}{{ text | upper }}!{% endmacro %}
  {{ shout(messages[0].content) }} {{ messages | selectattr("role", "equalto", "user") | list | length }}
  {# a comment #}
  {{ extra | default("no extra") }} {{ messages[-1].content.split("|")[0].strip() }} {{ documents is none }}
'''

TOKENS = {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'}

TALK = [
    {'role': 'system', 'content': '  Be brief.\n'},
    {'role': 'user', 'content': 'naïve 北京 🙂 <b>&amp;</b> "quoted"\n\n'},
    {'role': 'assistant', 'content': 'Yes.'},
    {'role': 'user', 'content': 'And |then?'},
]
TOOL = {'type': 'function', 'function': {
    'name': 'weather', 'description': "Today's weather <in> a town, é",
    'parameters': {'type': 'object', 'properties': {'town': {'type': 'string'}}, 'required': ['town']}}}
CALLED = TALK[:2] + [
    {'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': {
        'name': 'weather', 'arguments': {'town': 'Zürich', 'days': [1, 2.5, None]}}}]},
    {'role': 'tool', 'content': {'rain': True, 'degrees': -3}},
    {'role': 'skip', 'content': 'not this'},
]

CASES = {  # name -> (template, messages, options)
    'llama3': (LLAMA3, TALK, {'add_generation_prompt': True}),
    'llama3_no_prompt': (LLAMA3, TALK[1:3], {}),
    'llama31': (LLAMA31, TALK, {'add_generation_prompt': True, 'date_string': '26 Jul 2024'}),
    'llama31_tools': (LLAMA31, CALLED, {
        'tools': [TOOL], 'date_string': '1 Jan 2025', 'add_generation_prompt': True}),
    'smollm2': (SMOLLM2, TALK[1:], {'add_generation_prompt': True}),
    'smollm2_system': (SMOLLM2, TALK, {}),
    'features': (FEATURES, TALK, {'extra': 'more'}),
    'features_default': (FEATURES, TALK[1:], {}),
}
