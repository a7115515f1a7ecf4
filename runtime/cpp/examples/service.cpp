// A small service: keeps one pipeline, queues requests up to a bound, answers overload at once, stops on SIGTERM.
//
//     example-service BUNDLE SOCKET [QUEUE]
//
// A client connects to the Unix socket and sends one line, "LABEL SEED STEPS"; the answer is a line that begins with
// "ok HEIGHT WIDTH", "busy" or "error", after "ok" followed by the pixels, uint8 [height, width, 3]. After SIGTERM
// nothing new is taken, the picture that is being drawn stops after its step, and who waits hears "error".
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <dit/dit.hpp>
#include <filesystem>
#include <iostream>
#include <mutex>
#include <sstream>
#include <thread>

namespace {

std::atomic<bool> stopping{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may only touch what is lock-free");

using Clock = std::chrono::steady_clock;

// True if the client can be read from, or written to, before the deadline: no client may hold up the others.
bool ready(int client, short event, Clock::time_point deadline) {
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
        pollfd waiting = {client, event, 0};
        const int events = left > 0 ? poll(&waiting, 1, static_cast<int>(left)) : 0;
        if (events >= 0 || errno != EINTR) return events > 0;
    }
}

// The client has 5 seconds to take it.
void answer(int client, const std::string& text) {
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(5);
    for (std::size_t sent = 0; sent < text.size() && ready(client, POLLOUT, deadline);) {
        const ssize_t part = send(client, text.data() + sent, text.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (part <= 0) break;  // the client is gone
        sent += static_cast<std::size_t>(part);
    }
    close(client);
}

struct Job {
    int client;
    dit::Request request;
};

// The one thread that uses the pipeline, and the queue before it.
class Worker {
  public:
    Worker(dit::Pipeline& pipe, std::size_t bound) : pipe_(pipe), bound_(bound), thread_([this] { work(); }) {}

    ~Worker() {
        wake_.notify_all();
        thread_.join();
        for (const Job& job : queue_) answer(job.client, "error the service stops\n");
    }

    bool offer(Job job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (queue_.size() >= bound_) return false;
        queue_.push_back(std::move(job));
        wake_.notify_one();
        return true;
    }

  private:
    void work() {
        while (!stopping) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait_for(lock, std::chrono::milliseconds(200), [this] { return stopping || !queue_.empty(); });
            if (stopping || queue_.empty()) continue;
            Job job = std::move(queue_.front());
            queue_.pop_front();
            lock.unlock();
            job.request.on_step = [](int, int, const double*, std::size_t) { return stopping.load(); };
            std::string reply;
            try {
                const dit::Images images = pipe_.generate(job.request);
                reply = "ok " + std::to_string(images.height) + ' ' + std::to_string(images.width) + '\n';
                reply.append(images.pixels.begin(), images.pixels.end());
            } catch (const std::exception& error) {
                reply = std::string("error ") + error.what() + '\n';
            }
            answer(job.client, reply);
        }
    }

    dit::Pipeline& pipe_;
    const std::size_t bound_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job> queue_;
    std::thread thread_;
};

// One line of at most 200 bytes, within a second.
bool read_line(int client, std::string& line) {
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(1);
    char letter = 0;
    while (line.size() < 200 && ready(client, POLLIN, deadline) && recv(client, &letter, 1, MSG_DONTWAIT) == 1) {
        if (letter == '\n') return true;
        line += letter;
    }
    return false;
}

void take(int client, Worker& worker) {
    std::string line;
    Job job{client, {}};
    std::int64_t label = 0;
    std::uint64_t seed = 0;
    if (!read_line(client, line) || !(std::istringstream(line) >> label >> seed >> job.request.steps))
        return answer(client, "error expected LABEL SEED STEPS\n");
    job.request.labels = {label};
    job.request.seeds = {seed};
    if (!worker.offer(std::move(job))) answer(client, "busy\n");
}

std::size_t queue_size(const std::string& word) {
    if (word.empty() || word.size() > 6 || word.find_first_not_of("0123456789") != std::string::npos)
        throw std::runtime_error("QUEUE is '" + word + "'; expected a number");
    return std::stoul(word);
}

}  // namespace

int main(int count, char** words) try {
    if (count < 3) return std::cerr << "usage: " << words[0] << " BUNDLE SOCKET [QUEUE]\n", 2;
    const std::size_t queue = queue_size(count > 3 ? words[3] : "8");
    dit::OpenOptions options;
    options.warm = {1};  // pictures are drawn one at a time, and the first client waits for no compiler
    dit::Pipeline pipe(words[1], options);
    if (!pipe.info().image_shape[0]) throw std::runtime_error("this bundle has no decoder");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (std::strlen(words[2]) >= sizeof address.sun_path) throw std::runtime_error("the socket's path is too long");
    std::strcpy(address.sun_path, words[2]);
    const int server = socket(AF_UNIX, SOCK_STREAM, 0);
    const sockaddr* const place = reinterpret_cast<const sockaddr*>(&address);
    // A socket that nobody answers on was left by a service that could not remove it.
    if (std::filesystem::is_socket(words[2]) && connect(server, place, sizeof address) && errno == ECONNREFUSED)
        unlink(words[2]);
    if (server < 0 || bind(server, place, sizeof address) || listen(server, 64))
        throw std::runtime_error(std::string(words[2]) + ": " + std::strerror(errno));
    struct sigaction action = {};
    action.sa_handler = [](int) { stopping = true; };
    sigaction(SIGTERM, &action, nullptr);
    sigaction(SIGINT, &action, nullptr);
    {
        Worker worker(pipe, queue);
        std::cerr << "ready: " << words[2] << std::endl;
        while (!stopping) {
            pollfd waiting = {server, POLLIN, 0};
            if (poll(&waiting, 1, 200) <= 0) continue;
            const int client = accept(server, nullptr, nullptr);
            if (client >= 0) take(client, worker);
        }
    }
    close(server);
    unlink(words[2]);
    std::cerr << "stopped" << std::endl;
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
