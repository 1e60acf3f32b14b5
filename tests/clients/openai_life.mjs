// The life of a fine-tuning job with the npm package `openai`, as its users write it.
//
//     node openai_life.mjs openai    OPENAI_BASE_URL, OPENAI_API_KEY
//     node openai_life.mjs azure     AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_API_KEY, OPENAI_API_VERSION, and for the
//                                    deployment AZURE_MANAGEMENT_ENDPOINT, AZURE_MANAGEMENT_TOKEN
//
// The last line printed is JSON: what was seen.

import assert from 'node:assert/strict';
import { createReadStream, readFileSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import OpenAI, { AzureOpenAI, toFile } from 'openai';
import { VERSION } from 'openai/version';

const MODEL = 'gpt-4.1-mini-2025-04-14';
const ASK = [{ role: 'user', content: 'Which bell rings at noon?' }];
const azure = process.argv[2] === 'azure';
const client = azure ? new AzureOpenAI({ maxRetries: 0 }) : new OpenAI({ maxRetries: 0 });

async function main() {
  const [training, validation] = await upload();
  const job = await train(training, validation);
  const seen = {
    version: VERSION,
    job: job.id,
    model: job.fine_tuned_model,
    events: await events(job.id),
    checkpoints: await checkpoints(job.id),
    results: await results(job),
  };
  const name = azure ? 'bells' : job.fine_tuned_model;
  if (azure) await deploy(name, job.fine_tuned_model);
  seen.answer = await chat(name);
  await structured(name);
  await respond(name);
  seen.errors = await errors(name);
  if (azure) await manage('DELETE', name);
  await cleanUp(job.fine_tuned_model, [training, validation]);
  console.log(JSON.stringify(seen));
}

async function upload() {
  const rows = (first) =>
    Array.from({ length: 12 }, (_, n) =>
      JSON.stringify({
        messages: [
          { role: 'user', content: `Which bell rings at ${first + n}?` },
          { role: 'assistant', content: n % 2 ? 'The small one.' : 'The great one.' },
        ],
      }),
    ).join('\n') + '\n';
  writeFileSync('training.jsonl', rows(0));
  const training = await client.files.create({ file: createReadStream('training.jsonl'), purpose: 'fine-tune' });
  assert.equal(training.filename, 'training.jsonl');
  const sent = await toFile(Buffer.from(rows(12)), 'validation.jsonl');
  const validation = await client.files.create({ file: sent, purpose: 'fine-tune' });
  await client.files.waitForProcessing(training.id);
  assert.equal(await (await client.files.content(training.id)).text(), readFileSync('training.jsonl', 'utf8'));
  const listed = [];
  for await (const file of client.files.list({ purpose: 'fine-tune', limit: 1 })) listed.push(file.id);
  assert.ok(listed.includes(training.id) && listed.includes(validation.id));
  return [training.id, validation.id];
}

async function train(training, validation) {
  let job = await client.fineTuning.jobs.create({
    model: MODEL,
    training_file: training,
    validation_file: validation,
    seed: 105,
    suffix: 'bells',
    metadata: { tower: 'north' },
    method: { type: 'supervised', supervised: { hyperparameters: { n_epochs: 2, batch_size: 4 } } },
  });
  assert.equal(job.seed, 105);
  const second = await client.fineTuning.jobs.create({ model: MODEL, training_file: training });
  assert.equal((await client.fineTuning.jobs.cancel(second.id)).id, second.id);
  const found = [];
  for await (const one of client.fineTuning.jobs.list({ metadata: { tower: 'north' }, limit: 1 })) found.push(one.id);
  assert.ok(found.includes(job.id) && !found.includes(second.id));
  const until = Date.now() + 600_000;
  while (!['succeeded', 'failed', 'cancelled'].includes(job.status)) {
    assert.ok(Date.now() < until, job.status);
    await sleep(300);
    job = await client.fineTuning.jobs.retrieve(job.id);
  }
  assert.equal(job.status, 'succeeded', JSON.stringify(job.error));
  while ((await client.fineTuning.jobs.retrieve(second.id)).status !== 'cancelled') {
    assert.ok(Date.now() < until);
    await sleep(300);
  }
  return job;
}

async function events(job) {
  const messages = [];
  for await (const event of client.fineTuning.jobs.listEvents(job, { limit: 3 })) messages.unshift(event.message);
  return messages;
}

async function checkpoints(job) {
  const names = [];
  for await (const one of client.fineTuning.jobs.checkpoints.list(job, { limit: 1 })) {
    assert.ok(one.metrics.full_valid_loss > 0);
    names.push(one.fine_tuned_model_checkpoint);
  }
  return names;
}

async function results(job) {
  const text = await (await client.files.content(job.result_files[0])).text();
  const [columns] = (azure ? text : Buffer.from(text, 'base64').toString()).split('\n');
  return columns.split(',');
}

async function chat(name) {
  const asked = { model: name, messages: ASK, temperature: 1, seed: 7, max_tokens: 12 };
  const whole = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 1 });
  assert.ok(Array.isArray(whole.choices[0].logprobs.content));
  let said = '';
  let usage = null;
  const chunks = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of chunks) {
    said += chunk.choices[0]?.delta?.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(said, whole.choices[0].message.content);
  assert.deepEqual(usage, whole.usage);
  if (!azure) {
    const helper = client.chat.completions.stream(asked);
    assert.equal(await helper.finalContent(), said);
  }
  return said;
}

async function structured(name) {
  const schema = {
    type: 'object',
    properties: { bell: { enum: ['great', 'small'] } },
    required: ['bell'],
    additionalProperties: false,
  };
  const parsed = await client.chat.completions.parse({
    model: name,
    messages: ASK,
    max_tokens: 100,
    response_format: { type: 'json_schema', json_schema: { name: 'bell', strict: true, schema } },
  });
  assert.ok(['great', 'small'].includes(JSON.parse(parsed.choices[0].message.content).bell));
  const tool = { type: 'function', function: { name: 'ring', strict: true, parameters: schema } };
  const called = await client.chat.completions.create({
    model: name,
    messages: ASK,
    tools: [tool],
    tool_choice: 'required',
    parallel_tool_calls: false,
    max_tokens: 200,
  });
  const [call] = called.choices[0].message.tool_calls;
  assert.ok(['great', 'small'].includes(JSON.parse(call.function.arguments).bell));
  const answered = await client.chat.completions.create({
    model: name,
    messages: [...ASK, called.choices[0].message, { role: 'tool', tool_call_id: call.id, content: 'rung' }],
    tools: [tool],
    max_tokens: 4,
  });
  assert.equal(answered.choices.length, 1);
}

async function respond(name) {
  const asked = { model: name, input: 'Which bell?', max_output_tokens: 12, temperature: 0 };
  const whole = await client.responses.create(asked);
  const types = [];
  let said = '';
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    types.push(event.type);
    if (event.type === 'response.output_text.delta') said += event.delta;
  }
  assert.equal(said, whole.output_text);
  assert.equal(types[0], 'response.created');
  assert.ok(['response.completed', 'response.incomplete'].includes(types.at(-1)));
}

async function errors(name) {
  const Client = azure ? AzureOpenAI : OpenAI;
  const stranger = new Client({ apiKey: 'tw-not-a-key', maxRetries: 0 });
  const long = [{ role: 'user', content: 'bell '.repeat(4000) }];
  const wrong = {
    key: () => stranger.chat.completions.create({ model: name, messages: ASK }),
    model: () => client.chat.completions.create({ model: 'no-such-model', messages: ASK }),
    length: () => client.chat.completions.create({ model: name, messages: long }),
    job: () => client.fineTuning.jobs.retrieve('ftjob-none'),
  };
  const found = {};
  for (const [what, call] of Object.entries(wrong)) {
    await assert.rejects(call, (error) => {
      found[what] = [error.constructor.name, error.code];
      return error instanceof OpenAI.APIError;
    });
  }
  return found;
}

async function manage(method, deployment, body) {
  const account =
    'subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/local' +
    '/providers/Microsoft.CognitiveServices/accounts/local';
  const url = `${process.env.AZURE_MANAGEMENT_ENDPOINT}/${account}/deployments/${deployment}?api-version=2024-10-01`;
  const reply = await fetch(url, {
    method,
    headers: {
      Authorization: `Bearer ${process.env.AZURE_MANAGEMENT_TOKEN}`,
      'Content-Type': 'application/json',
    },
    body: body && JSON.stringify(body),
  });
  assert.ok(reply.ok, `${method} ${reply.status}`);
  return method === 'DELETE' ? null : reply.json();
}

async function deploy(deployment, model) {
  let made = await manage('PUT', deployment, {
    sku: { name: 'Standard', capacity: 100 },
    properties: { model: { format: 'OpenAI', name: model, version: '1' } },
  });
  while (!['Succeeded', 'Failed'].includes(made.properties.provisioningState)) {
    await sleep(200);
    made = await manage('GET', deployment);
  }
  assert.equal(made.properties.provisioningState, 'Succeeded');
}

async function cleanUp(model, files) {
  assert.ok((await client.models.delete(model)).deleted);
  await assert.rejects(client.models.retrieve(model), OpenAI.NotFoundError);
  for (const file of files) {
    assert.ok((await client.files.delete(file)).deleted);
    await assert.rejects(client.files.retrieve(file), OpenAI.NotFoundError);
  }
}

await main();
