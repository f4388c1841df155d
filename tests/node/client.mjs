// Drives a server with OpenAI's client for JavaScript; prints what came back as one JSON object.
//   node client.mjs BASE_URL MODEL
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const request = { model, prompt: "ROMEO:", max_tokens: 24, seed: 5, n: 2, logprobs: 2 };

async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    const { name } = error.constructor;
    return { name, status: error.status, code: error.code, param: error.param, type: error.type };
  }
  return null;
}

const whole = await client.completions.create(request);

const streamed = { texts: ["", ""], reasons: [null, null], usage: null };
const stream = await client.completions.create({
  ...request,
  logprobs: null,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  for (const choice of chunk.choices) {
    streamed.texts[choice.index] += choice.text;
    streamed.reasons[choice.index] = choice.finish_reason ?? streamed.reasons[choice.index];
  }
  streamed.usage = chunk.usage ?? streamed.usage;
}

const models = [];
for await (const entry of client.models.list()) models.push(entry.id);

const refused = {
  range: await refusal(client.completions.create({ ...request, temperature: 3 })),
  model: await refusal(client.completions.create({ ...request, model: "nobody" })),
  field: await refusal(client.completions.create({ ...request, colour: "blue" })),
};

console.log(JSON.stringify({ whole, streamed, models, refused }));
