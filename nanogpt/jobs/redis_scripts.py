"""What the store does inside Redis, in Lua: each script is one atomic step.

Keys below the prefix P (KEYS[1], braces included, so that a Redis cluster keeps them together):

    P:job:ID       hash     what `put` was given (spec), and the store's own fields
    P:records:ID   stream   record number i has the id 0-(i+1); 1-1 marks the end of the job
    P:queue:LANE   sorted   jobs that can be claimed, by their number
    P:leases       sorted   jobs that are held, by the end of the lease
    P:sent         sorted   with SQS: jobs of which it has a message; see sqs_scripts.py
    P:ended        sorted   jobs that have ended, by when they are forgotten
    P:repeats      sorted   those of them that only answer a repeat of their request
    P:list:KIND, P:list:KIND:OWNER   sorted, by number, for pages
    P:name:NAME    string   the job with this idempotency name
    P:counts       hash     jobs by "LANE:STATUS"
    P:number, P:bytes       the last job's number; bytes of all jobs
    P:content:ID   list     the content of a file in pieces; it is there as long as the file's job
    P:part:NAME    list     content on its way; goes away by itself
    P:contents     hash     bytes of content, by file
    P:file-bytes   string   of all content
    P:wake         stream   its last entry changes whenever there may be something to claim

ARGV[1] is empty, or the time for tests: all servers go by the clock of Redis. A lease that ran out
is noticed by the next claim, which puts the job back to its place in the queue.
"""

from nanogpt.jobs.store import ONCE_S

COMMON = (
    """
local P = KEYS[1]
local now = tonumber(ARGV[1])
if not now then
    local time = redis.call('TIME')
    now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local function job(id) return P .. ':job:' .. id end
local function records(id) return P .. ':records:' .. id end
local function whole(id) return redis.call('HGETALL', job(id)) end
local function field(id, name) return redis.call('HGET', job(id), name) end
local function wake() redis.call('XADD', P .. ':wake', 'MAXLEN', 1, '*', 'w', '') end
local function count(id, status, by)
    local kind, lane = unpack(redis.call('HMGET', job(id), 'kind', 'lane'))
    if kind ~= 'file' then redis.call('HINCRBY', P .. ':counts', lane .. ':' .. status, by) end
end
local function set_status(id, status)
    count(id, field(id, 'status'), -1)
    redis.call('HSET', job(id), 'status', status)
    count(id, status, 1)
end
local function queue(id)
    local lane, number = unpack(redis.call('HMGET', job(id), 'lane', 'number'))
    redis.call('ZREM', P .. ':leases', id)
    redis.call('ZREM', P .. ':sent', id)
    redis.call('ZADD', P .. ':queue:' .. lane, number, id)
end
local function unqueue(id)
    redis.call('ZREM', P .. ':leases', id)
    redis.call('ZREM', P .. ':sent', id)
    redis.call('ZREM', P .. ':queue:' .. field(id, 'lane'), id)
end
local function queue_expired()
    local found = redis.call('ZRANGEBYSCORE', P .. ':leases', '-inf', now, 'LIMIT', 0, 1000)
    for _, id in ipairs(found) do queue(id) end
    return found
end
local function hold(id, lease)
    unqueue(id)
    redis.call('ZADD', P .. ':leases', now + lease, id)
end
local function take(id, lease)
    hold(id, lease)
    set_status(id, 'in_progress')
    redis.call('HINCRBY', job(id), 'fence', 1)
    redis.call('HINCRBY', job(id), 'tries', 1)
    redis.call('HSETNX', job(id), 'started', now)
    return whole(id)
end
local function grow(id, bytes)
    redis.call('HINCRBY', job(id), 'bytes', bytes)
    redis.call('INCRBY', P .. ':bytes', bytes)
end
local function verdict(id, fence)
    local found = redis.call('HMGET', job(id), 'status', 'fence', 'cancelled')
    if found[1] ~= 'in_progress' or found[2] ~= fence then return 'lost' end
    return found[3] and 'cancelled' or 'held'
end
local function add(id, first, last, state)
    local number = tonumber(field(id, 'records') or 0)
    for i = first, last do
        number = number + 1
        redis.call('XADD', records(id), string.format('0-%d', number), 'd', ARGV[i])
        redis.call('HINCRBY', job(id), 'recorded', #ARGV[i] + 32)
        grow(id, #ARGV[i] + 32)
    end
    redis.call('HSET', job(id), 'records', number, 'tries', 0)
    if state then
        grow(id, #state - #(field(id, 'state') or ''))
        redis.call('HSET', job(id), 'state', state)
    end
end
local function forget_records(id)
    redis.call('UNLINK', records(id))
    grow(id, 0 - tonumber(field(id, 'recorded') or 0))  -- no "-0"
    redis.call('HDEL', job(id), 'recorded')
end
local function expire(id)
    local keep, lane = unpack(redis.call('HMGET', job(id), 'keep', 'lane'))
    redis.call('ZADD', P .. ':ended', now + tonumber(keep), id)
    if lane == '0' then redis.call('ZADD', P .. ':repeats', now + tonumber(keep), id) end
end
local function finish(id, status, result)
    unqueue(id)
    set_status(id, status)
    redis.call('HSET', job(id), 'result', result, 'finished', now)
    grow(id, #result)
    expire(id)
    redis.call('XADD', records(id), '1-1', 'e', '')
end
local function forget(id)
    local found = redis.call('HMGET', job(id), 'kind', 'owner', 'status', 'once', 'bytes')
    if not found[1] then return 0 end
    unqueue(id)
    count(id, found[3], -1)
    redis.call('INCRBY', P .. ':bytes', -tonumber(found[5]))
    for _, key in ipairs({':ended', ':repeats', ':list:' .. found[1],
                          ':list:' .. found[1] .. ':' .. found[2]}) do
        redis.call('ZREM', P .. key, id)
    end
    local name = P .. ':name:' .. found[4]
    if redis.call('GET', name) == id then redis.call('DEL', name) end
    redis.call('UNLINK', job(id), records(id))
    local size = found[1] == 'file' and redis.call('HGET', P .. ':contents', id)
    if size then
        redis.call('HDEL', P .. ':contents', id)
        redis.call('DECRBY', P .. ':file-bytes', size)
        redis.call('UNLINK', P .. ':content:' .. id)
    end
    return 1
end
local function named(once)
    local id = once ~= '' and redis.call('GET', P .. ':name:' .. once)
    local created = id and field(id, 'created')
    if created and tonumber(created) + """
    + str(ONCE_S)
    + """ > now then return id end
    return nil
end
"""
)

# ARGV: id, kind, owner, lane, created, keep, once, status, spec, size, most queued, most bytes; of
# a file also the name, pieces and bytes of its content, and the id and fence of the job that makes
# it ("" for none). Returns nil; or 'known' and the fields of the job that is there already; or why
# it is not accepted: what there is too much of, 'part' when the content is not whole, 'lost' when
# the lease is.
PUT = (
    COMMON
    + """
local id, kind, owner, lane, created, keep, once, status, spec, size, most, bytes =
    unpack(ARGV, 2, 13)
local part, pieces, content, maker, fence = unpack(ARGV, 14, 18)
local function refused()
    if redis.call('EXISTS', job(id)) == 1 then return {'known', whole(id)} end
    local known = named(once)
    if known then return {'known', whole(known)} end
    if status == 'queued' then
        local open = 0
        local counts = redis.call('HGETALL', P .. ':counts')
        for i = 1, #counts, 2 do
            local state = counts[i]:match(':(.*)')
            if state == 'queued' or state == 'in_progress' then open = open + counts[i + 1] end
        end
        if open >= tonumber(most) then return {'queued', open} end
    end
    if tonumber(redis.call('GET', P .. ':bytes') or 0) > tonumber(bytes) then
        return {'bytes', 0}
    end
    if not part then return nil end
    if maker ~= '' and verdict(maker, fence) == 'lost' then return {'lost', 0} end
    if redis.call('LLEN', P .. ':part:' .. part) ~= tonumber(pieces) then return {'part', 0} end
    return nil
end
local answer = refused()
if answer then
    if part then redis.call('UNLINK', P .. ':part:' .. part) end
    return answer
end
if part then
    local key = P .. ':content:' .. id
    redis.call('UNLINK', key)
    if tonumber(pieces) > 0 then
        redis.call('RENAME', P .. ':part:' .. part, key)
        redis.call('PERSIST', key)
    end
    redis.call('HSET', P .. ':contents', id, content)
    redis.call('INCRBY', P .. ':file-bytes', tonumber(content))
end
local number = redis.call('INCR', P .. ':number')
redis.call('HSET', job(id), 'spec', spec, 'number', number, 'kind', kind, 'owner', owner,
    'lane', lane, 'created', created, 'keep', keep, 'once', once, 'status', status,
    'bytes', 0, 'records', 0)
count(id, status, 1)
grow(id, tonumber(size))
if once ~= '' then redis.call('SET', P .. ':name:' .. once, id) end
redis.call('ZADD', P .. ':list:' .. kind, number, id)
redis.call('ZADD', P .. ':list:' .. kind .. ':' .. owner, number, id)
if status == 'queued' then
    redis.call('ZADD', P .. ':queue:' .. lane, number, id)
    wake()
else
    redis.call('ZADD', P .. ':ended', tonumber(created) + tonumber(keep), id)
end
return nil
"""
)

# ARGV: last lane, lease in seconds. Returns the job's fields, or the last id of the wake stream.
CLAIM = (
    COMMON
    + """
queue_expired()
for lane = 0, tonumber(ARGV[2]) do
    local id = redis.call('ZRANGE', P .. ':queue:' .. lane, 0, 0)[1]
    if id then return take(id, tonumber(ARGV[3])) end
end
local last = redis.call('XREVRANGE', P .. ':wake', '+', '-', 'COUNT', 1)[1]
return last and last[1] or '0-0'
"""
)

# ARGV: lease in seconds, then id and fence of each. Returns the verdicts.
RENEW = (
    COMMON
    + """
local verdicts, lease = {}, tonumber(ARGV[2])
for i = 3, #ARGV, 2 do
    local id = ARGV[i]
    local found = verdict(id, ARGV[i + 1])
    verdicts[#verdicts + 1] = found
    if found ~= 'lost' and lease > 0 then
        hold(id, lease)
    elseif found ~= 'lost' then
        redis.call('HSET', job(id), 'tries', 0)
        queue(id)
        wake()
    end
end
return verdicts
"""
)

# ARGV: id, fence, token of this write, "1" with a state, the state, records. A write whose answer
# was lost is made again with its token, and then changes nothing.
APPEND = (
    COMMON
    + """
local id, fence, token = ARGV[2], ARGV[3], ARGV[4]
local found = verdict(id, fence)
if found == 'lost' or field(id, 'token') == token then return found end
add(id, 7, #ARGV, ARGV[5] == '1' and ARGV[6] or nil)
redis.call('HSET', job(id), 'token', token)
return found
"""
)

# ARGV: id, fence, token, "1" with a state, the state, status, result, "1" to forget the records,
# records. Returns 1 when this write has ended the job.
COMPLETE = (
    COMMON
    + """
local id, fence, token = ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', job(id)) == 1 and field(id, 'token') == token then return 1 end
if verdict(id, fence) == 'lost' then return 0 end
add(id, 10, #ARGV, ARGV[5] == '1' and ARGV[6] or nil)
if ARGV[9] == '1' then forget_records(id) end
finish(id, ARGV[7], ARGV[8])
redis.call('HSET', job(id), 'token', token)
return 1
"""
)

CANCEL = (
    COMMON
    + """
local id = ARGV[2]
local status = field(id, 'status')
if status == 'queued' then
    redis.call('HSET', job(id), 'cancelled', now)
    finish(id, 'cancelled', '')
elseif status == 'in_progress' then
    redis.call('HSETNX', job(id), 'cancelled', now)
end
return whole(id)
"""
)

DELETE = COMMON + "return forget(ARGV[2])"

FIND = (
    COMMON
    + """
local id = named(ARGV[2])
return id and whole(id)
"""
)

# ARGV: how many at once, bytes above which repeats make room. Returns the ids that are gone.
SWEEP = (
    COMMON
    + """
local gone = redis.call('ZRANGEBYSCORE', P .. ':ended', '-inf', now, 'LIMIT', 0, ARGV[2])
if #gone == 0 and tonumber(redis.call('GET', P .. ':bytes') or 0) > tonumber(ARGV[3]) then
    gone = redis.call('ZRANGE', P .. ':repeats', 0, tonumber(ARGV[2]) - 1)
end
for _, id in ipairs(gone) do forget(id) end
return gone
"""
)
