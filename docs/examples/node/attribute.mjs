// Asks Byline which training images made an image possible, from the protos alone.
//
//   npm install
//   node attribute.mjs IMAGE [PROMPT] [TIER]        TIER: RETRIEVED (default) or VERIFIED
//
// BYLINE_GRPC_ADDRESS and BYLINE_PROTOS say where the server and the protos are.
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import path from "node:path";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const here = path.dirname(fileURLToPath(import.meta.url));
const protos = process.env.BYLINE_PROTOS ?? path.join(here, "../../../protos");
const address = process.env.BYLINE_GRPC_ADDRESS ?? "127.0.0.1:50551";
const [file, prompt = "", tier = "RETRIEVED"] = process.argv.slice(2);
if (!file) {
  console.error("usage: node attribute.mjs IMAGE [PROMPT] [TIER]");
  process.exit(2);
}

// keepCase: names as in the protos. longs as strings: item ids are 64 bits wide, a JavaScript number is not.
const definition = protoLoader.loadSync(
  "attribution/v1/attribution_service.proto",
  {
    includeDirs: [protos, path.join(protos, "third_party")],
    keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
  },
);
const { attribution } = grpc.loadPackageDefinition(definition);
const client = new attribution.v1.AttributionService(address, grpc.credentials.createInsecure());
const deadline = (seconds) => ({ deadline: Date.now() + seconds * 1000 });

// Every error carries a google.rpc.Status whose ErrorInfo has a stable reason.
const details = new protobuf.Root();
details.resolvePath = (_, target) => path.join(protos, "third_party", target);
details.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"]);
const Status = details.lookupType("google.rpc.Status");
const ErrorInfo = details.lookupType("google.rpc.ErrorInfo");

function reasonOf(error) {
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const info = bytes && Status.decode(bytes).details.find((one) => one.type_url.endsWith("/google.rpc.ErrorInfo"));
  return info ? ErrorInfo.decode(info.value).reason : grpc.status[error.code];
}

const request = {
  parent: "projects/default",
  request_id: randomUUID(), // makes a retry safe
  attribution_job: {
    query: { inline_image: readFileSync(file), prompt },
    options: { tier: `TIER_${tier}`, top_k: 5 },
  },
};

client.CreateAttributionJob(request, deadline(10), (error, job) => {
  if (error) {
    console.error(`${reasonOf(error)}: ${error.details}`);
    process.exit(1);
  }
  console.log(`created ${job.name}`);
  const stream = client.WatchAttributionJob({ name: job.name }, deadline(600));
  let last;
  stream.on("data", ({ attribution_job }) => {
    last = attribution_job;
    const { stage, done, total } = last.progress ?? {};
    console.log(last.state, last.progress ? `${stage} ${done}/${total}` : "");
  });
  stream.on("error", (failure) => {
    console.error(`${reasonOf(failure)}: ${failure.details}`);
    process.exit(1);
  });
  stream.on("end", () => {
    const answer = last.answers.at(-1);
    if (!answer) {
      console.error(`${last.state}: ${last.error?.message ?? "no answer"}`);
      process.exit(1);
    }
    console.log(`${answer.tier} from ${answer.release}`);
    for (const one of answer.influences) {
      const score = one.tau === undefined ? `cosine ${one.cosine.toFixed(3)}` : `tau ${one.tau.toPrecision(3)}`;
      console.log(`${one.rank}. ${one.caption} by ${one.creator} (${one.licence}), ${score}, item ${one.item_id}`);
    }
    client.close();
  });
});
